class DataIOConnlNer2003:
    def read_data(self, fn, verbose=True, column_no=-1):
        with open(fn) as file:
            blocks = file.read().strip().split("\n\n")
        rows = [[line.split(" ") for line in block.splitlines()] for block in blocks]
        return [[r[0] for r in block] for block in rows], [[r[-1] for r in block] for block in rows]
