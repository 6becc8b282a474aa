class Report:
    def __init__(self, fn):
        self.fn, self.text = fn, ""

    def write_epoch_scores(self, epoch, scores):
        self.text += " ".join(map(str, (epoch, *scores))) + "\n"
        with open(self.fn, "w") as file:
            file.write(self.text)
