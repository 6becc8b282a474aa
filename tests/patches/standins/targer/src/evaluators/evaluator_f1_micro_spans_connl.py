from src.evaluators.evaluator_base import EvaluatorBase


def spans(tags):
    found, begin, kind = set(), None, None
    for t, tag in enumerate([*tags, "O"]):
        goes_on = tag.startswith("I-") and tag[2:] == kind
        if kind is not None and not goes_on:
            found.add((begin, t, kind))
            kind = None
        if tag != "O" and not goes_on:
            begin, kind = t, tag[2:]
    return found


class EvaluatorF1MicroSpansConnl(EvaluatorBase):
    def get_evaluation_score(self, targets_tag_sequences, outputs_tag_sequences, word_sequences):
        right = wanted = given = 0
        for targets, outputs in zip(targets_tag_sequences, outputs_tag_sequences, strict=True):
            a, b = spans(targets), spans(outputs)
            right, wanted, given = right + len(a & b), wanted + len(a), given + len(b)
        return round(200 * right / max(1, wanted + given), 2), "message"
