"""Stand-in: trains a tagger, evaluates before and after each epoch, saves."""

import argparse
import os.path

import torch
from src.classes.datasets_bank import DatasetsBank
from src.classes.report import Report
from src.data_io.data_io_connl_ner_2003 import DataIOConnlNer2003
from src.evaluators.evaluator_f1_micro_spans_connl import EvaluatorF1MicroSpansConnl
from src.factories.factory_tagger import TaggerFactory
from src.models.tagger_birnn_cnn_crf import TaggerBiRNNCNNCRF
from src.seq_indexers.indexer import Indexer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--train", "--dev", "--test", "--emb-fn", "--save", "--load", "--word-seq-indexer"):
        parser.add_argument(name)
    parser.add_argument("--report-fn", default="report.txt")
    parser.add_argument("--rnn-type", default="LSTM")
    for name, default in (("--gpu", 0), ("--batch-size", 10), ("--emb-dim", 100), ("--seed-num", 42)):
        parser.add_argument(name, type=int, default=default)
    # Of the host's own model, which is none of this one's.
    parser.add_argument("--model", default="BiRNNCNNCRF")
    parser.add_argument("--char-window-size", type=int, default=3)
    parser.add_argument("--char-cnn_filter-num", type=int, default=30)
    parser.add_argument("--word-len", type=int, default=20)
    parser.add_argument("--epoch-num", "-e", type=int, default=100)
    parser.add_argument("--dropout-ratio", type=float, default=0.5)
    args = parser.parse_args()
    assert os.path.isfile("conlleval"), "the working directory must have it"
    torch.manual_seed(args.seed_num)
    io = DataIOConnlNer2003()
    bank = DatasetsBank([io.read_data(path) for path in (args.train, args.dev, args.test)])
    with open(args.emb_fn) as file:
        vectors = {line.split(" ", 1)[0] for line in file}
    words = [word for part, _ in bank.parts for sentence in part for word in sentence]
    assert all(word.lower() in vectors for word in words)
    if args.load:
        tagger = TaggerFactory.load(args.load, args.gpu)
    else:
        tags = [tag for _, part in bank.parts for sentence in part for tag in sentence]
        tagger = TaggerBiRNNCNNCRF(Indexer(words), Indexer(tags), args.dropout_ratio, args.rnn_type)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.02)
    report = Report(args.report_fn)
    for epoch in range(args.epoch_num + 1):
        loss_sum = count = 0
        if epoch:
            for batch in bank.get_train_batches(args.batch_size):
                tagger.train()
                tagger.zero_grad()
                loss = tagger.get_loss(*batch)
                loss.backward()
                optimizer.step()
                loss_sum, count = loss_sum + loss.item(), count + 1
        *scores, _ = EvaluatorF1MicroSpansConnl().get_evaluation_score_train_dev_test(tagger, bank)
        report.write_epoch_scores(epoch, (100 * loss_sum / max(1, count), *scores))
        tagger.save_tagger(args.save)
    print("trained")
