"""Make the cut-outs from Debian's tuxpaint-stamps-default.

apt-get download tuxpaint-stamps-default
dpkg -x tuxpaint-stamps-default_*.deb stamps
python make.py stamps
"""

import argparse
from pathlib import Path

from PIL import Image

STAMPS = Path("usr/share/tuxpaint/stamps")
SIDE = 48  # scenes draw objects of 20 to 30 pixels
SOURCES = {
    "teapot": "household/dishes/teapot",
    "mug": "household/dishes/mug",
    "kettle": "household/kettle",
    "banana": "food/fruit/banana",
    "apple": "food/fruit/apple_red",
    "orange": "food/fruit/orange",
    "tomato": "food/vegetables/tomato",
    "broccoli": "food/vegetables/broccoli",
    "cow": "animals/mammals/bovines/cow",
    "sheep": "animals/mammals/bovines/sheep",
    "pig": "animals/mammals/pig_golden",
    "horse": "animals/mammals/equines/horse",
    "rooster": "animals/birds/rooster",
    "dog": "animals/mammals/dogs/dog",
    "rabbit": "animals/mammals/rodents/rabbit",
    "goat": "animals/mammals/bovines/goat",
    "elephant": "animals/mammals/elephant",
    "giraffe": "animals/mammals/giraffe",
    "zebra": "animals/mammals/equines/zebra",
    "lion": "animals/mammals/cats/lion",
    "tiger": "animals/mammals/cats/tiger",
    "bear": "animals/mammals/bears/bear",
    "gorilla": "animals/mammals/apes/gorilla",
    "camel": "animals/mammals/camel/camel",
    "dolphin": "animals/mammals/aquatic/dolphin",
    "orca": "animals/mammals/aquatic/orca",
    "clownfish": "animals/fish/clownfish",
    "lobster": "animals/fish/lobster",
    "seahorse": "animals/fish/seahorse",
    "penguin": "animals/birds/penguin",
    "otter": "animals/mammals/aquatic/otter",
    "seagull": "animals/birds/seagull",
    "car": "vehicles/auto/sedan",
    "firetruck": "vehicles/emergency/firetruck",
    "bus": "vehicles/masstransit/green_korean_bus",
    "truck": "vehicles/auto/truck",
    "mailbox": "town/usps_mailbox",
    "bin": "household/garbagecan",
    "tricycle": "vehicles/cycle/pink_tricycle",
    "dumper": "vehicles/construction/dumper",
    "guitar": "hobbies/music/string/guitar_classical",
    "violin": "hobbies/music/string/violin",
    "trumpet": "hobbies/music/brass/trumpet",
    "drum": "hobbies/music/percussion/drum_tomtom_floor",
    "soccerball": "sports/soccer",
    "basketball": "sports/basketball",
    "camera": "hobbies/camera_35mm",
    "trophy": "sports/trophy_cup",
}


def cut(source):
    """The stamp without its empty border, its longest side 48 pixels."""
    image = Image.open(source).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    ratio = SIDE / max(image.size)
    return image.resize([max(2, round(side * ratio)) for side in image.size], Image.LANCZOS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder that dpkg -x wrote")
    package = parser.parse_args().package
    for name, source in SOURCES.items():
        cut(package / STAMPS / f"{source}.png").save(Path(__file__).parent / f"{name}.png", optimize=True)
