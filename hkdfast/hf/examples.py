"""A user's own examples of text, or of questions about images, for distillation: read and checked before the work."""

from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from ..data import jsonl
from ..data.image_mark import without_mark
from ..data.images import rgb
from .generate import check_texts
from .loading import reading
from .teachers import TEACHER_ID


def read(path):
    """[(place, example)] of a JSON-lines file, of a folder that `Dataset.save_to_disk` wrote, or of one with data files
    that `datasets.load_dataset` reads (its split "train").

    Args:
        path: file or folder.

    Returns:
        list of ("file:line" or "folder, example N", dict), or for a folder something that behaves like it.

    Raises:
        OSError, ValueError: nothing there, or what cannot be read; names file and line.
        ImportError: a folder, and datasets is not installed.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return [(f"{path}:{number}", record) for number, record in jsonl.read(path)]
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"--data {path} is a folder, which the package datasets reads", name="datasets") from error
    with reading("dataset", path):
        try:
            found = datasets.load_from_disk(str(path))
        except FileNotFoundError:  # not of save_to_disk: a folder of data files
            found = datasets.load_dataset(str(path), split="train")
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise ValueError(f"dataset {str(path)!r} has the splits {', '.join(found)}, expected one of the name train")
        found = found["train"]
    if not len(found):
        raise ValueError(f"dataset {str(path)!r} has no examples")
    return Placed(found, path)


class Placed:
    """The rows of a dataset of `datasets`, each with its place. Columns that are None in a row are left out of it:
    a dataset has all columns in every row."""

    def __init__(self, rows, path):
        self.rows, self.path = rows, path

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.placed(index, self.rows[index])

    def __iter__(self):
        return (self.placed(index, row) for index, row in enumerate(self.rows))

    def placed(self, index, row):
        kept = {name: value for name, value in row.items() if value is not None or name == "completion"}
        if kept.get("completion", "") is None and "prompt" not in kept:
            del kept["completion"]
        return f"{self.path}, example {index}", kept


def check_teachers(examples, names):
    """See that every example names its teacher where there are several, and none where there is one.

    Args:
        names: of the teachers; [None] for a single one.
    """
    for place, example in examples:
        name = example.get(TEACHER_ID)
        if names == [None] and name is not None:
            raise ValueError(f"{place}: {TEACHER_ID} is {jsonl.shown(name)}, but --teacher is one: name several")
        if names != [None] and name not in names:
            given = f"{TEACHER_ID} is {jsonl.shown(name)}" if name is not None else f"no field {TEACHER_ID!r}"
            raise ValueError(f"{place}: {given}, expected one of {', '.join(names)}, the teachers of --teacher")


class EncodedTexts(Dataset):
    """Examples of text as tokens, all of them encoded and checked at once.

    Args:
        examples: [(place, dict)], as `read` gives them.
        collator: TextCollator, which knows the forms of an example.

    Raises:
        ValueError: an example that the collator does not take; names its place.
    """

    def __init__(self, examples, collator):
        self.rows = []
        for place, example in tqdm(examples, desc="examples", unit="", disable=None, leave=False):
            row = collator.encode(example, place)
            self.rows.append(row | {name: x for name, x in example.items() if name == TEACHER_ID})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def longest(self, size):
        """So many of the longest examples."""
        return sorted(self.rows, key=lambda row: -len(row["input_ids"]))[:size]


class ImageQuestions(Dataset):
    """Examples of questions about images: {"image", "text"}, and "answer" where it is known; else a teacher gives it.

    Args:
        examples: [(place, dict)], as `read` gives them.
        processor: of the model.
        folder: of the images that are file names; None where the examples hold the images themselves.

    Raises:
        OSError: an image that is missing.
        ValueError: a field that is missing or wrong, an image that does not decode, a text that the processor cannot
            take; names the place.
    """

    def __init__(self, examples, processor, folder=None):
        self.examples, self.folder, texts, self.lengths = examples, folder and Path(folder).expanduser(), [], []
        for place, example in tqdm(examples, desc="examples", unit="", disable=None, leave=False):
            made = self.question(place, example)
            try:
                rgb(made["image"])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            written = [text for text in (made["text"], made["answer"]) if text]
            texts += [(place, text) for text in written]
            self.lengths.append(sum(map(len, written)))
        check_texts(processor, texts)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.question(*self.examples[index])

    def longest(self, size):
        """So many of the examples with the longest texts."""
        order = sorted(range(len(self)), key=lambda index: -self.lengths[index])
        return [self[index] for index in order[:size]]

    def question(self, place, example):
        """The example as QuestionCollator takes it."""
        for name in ("image", "text"):
            if example.get(name) is None:
                raise ValueError(f"{place}: no field {name!r}; found {', '.join(map(repr, example)) or 'none'}")
        answer, text = example.get("answer"), example["text"]
        for name, value in (("text", text), ("answer", answer)):
            if not isinstance(value, str | None):
                raise ValueError(f"{place}: {name} is {jsonl.shown(value)}, expected a text")
        text = without_mark(f"{place}: text", text)
        made = {"image": self.image(place, example["image"]), "text": text, "answer": answer}
        return made | {name: x for name, x in example.items() if name == TEACHER_ID}

    def image(self, place, image):
        """The path of an image that is given by its file name, or the image itself."""
        if not isinstance(image, str):
            return image
        if self.folder is None:
            raise ValueError(f"{place}: image is the file {image!r}, name the folder of the images by --images")
        if not (self.folder / image).is_file():
            raise FileNotFoundError(f"{place}: the image {image!r} is not in {str(self.folder)!r}")
        return self.folder / image
