class EvaluatorBase:
    def get_evaluation_score_train_dev_test(self, tagger, datasets_bank, batch_size=-1):
        scores = []
        for words, tags in datasets_bank.parts:
            score, message = self.get_evaluation_score(tags, tagger.predict_tags_from_words(words), words)
            scores.append(score)
        return (*scores, message)
