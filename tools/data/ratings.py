"""Film reviews that people rated, as our data sets: 10,247 sentences, each with 15 to 29 ratings
from -4 to 4 (Hutto and Gilbert 2014, "VADER", ICWSM).

    python data_gen.py download ratings --path data/reviews

They lie in the source distribution of vaderSentiment 0.5 on PyPI (MIT license), which pip fetches
and checks; the archive in it is read where it is. A sentence stands in one part only:

    actor_training_data     demonstrations: the beginning of a sentence, and how it went on
    reward_training_data    ratings A, for the reward model: the score is the mean of the ratings;
                            its _eval, held out, also has the single `ratings`
    gold_training_data      ratings B, for a reward model that PPO never sees
    rlhf_training_data      beginnings of other sentences
"""

import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from lib.data import save_all
from lib.errors import explain, stop

SDIST = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
PARTS = {"actor_training_data": 1200, "actor_training_data_eval": 200, "reward_training_data": 2800,
         "reward_training_data_eval": 600, "gold_training_data": 2800,
         "gold_training_data_eval": 400, "rlhf_training_data_eval": 200}  # and the rest: prompts
ASKED = "Finish this sentence of a film review: "


def fetch():
    """The two text files of the film reviews, ratings and sentences. pip compares the hash before
    it opens the archive."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = os.path.join(folder, "requirements.txt")
        with open(wanted, "w") as file:
            file.write(f"vaderSentiment==0.5 --hash=sha256:{SHA256}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
             ":all:", "--dest", folder, "--requirement", wanted], capture_output=True, text=True)
        if done.returncode:
            stop(f"{SDIST}: cannot be downloaded ({done.stderr.strip().splitlines()[-1]})", code=1)
        with zipfile.ZipFile(os.path.join(folder, SDIST)) as sdist:
            inner = io.BytesIO(sdist.read(ARCHIVE))
        with tarfile.open(fileobj=inner) as archive:
            return [archive.extractfile(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
                    .read().decode("utf-8-sig", "replace")
                    for name in ("anonDataRatings", "GroundTruth")]


def read_reviews(ratings, sentences):
    """[(sentence, [rating, ...])] of the two texts, whose lines are "number, mean, deviation,
    [ratings]" and "number, mean, sentence" with tabs between. Sentences of fewer than five words
    are left out, and what occurs twice."""
    by_number = {}
    for line in ratings.splitlines():
        number, _, _, values = line.split("\t")
        by_number[number] = [int(value) for value in values.strip("[] ").split(",")]
    reviews = {}
    for line in sentences.splitlines():
        number, mean, text = line.split("\t")
        values, text = by_number[number], " ".join(text.split())
        if abs(sum(values) / len(values) - float(mean)) > 1e-3:
            raise ValueError(f"sentence {number} has the mean {mean}, and other ratings")
        if len(text.split()) >= 5:
            reviews.setdefault(text, values)
    return list(reviews.items())


def as_record(rng, text, ratings):
    """A sentence whose first two to four words are given, with the mean of its ratings."""
    words = text.split()
    given = rng.randint(2, min(4, len(words) - 2))
    return {"user_input": ASKED + " ".join(words[:given]), "completion": " ".join(words[given:]),
            "score": round(sum(ratings) / len(ratings), 4), "ratings": ratings}


def sets_of_reviews(reviews, seed):
    """{name of a file: its records}; a sentence is in one of them."""
    rng = random.Random(seed)
    records = [as_record(rng, *review) for review in rng.sample(reviews, len(reviews))]
    files, start = {}, 0
    for name, number in [*PARTS.items(), ("rlhf_training_data", len(records))]:
        files[name], start = records[start:start + number], start + number
    for name, part in files.items():
        fields = ["user_input"] + ["completion"] * ("rlhf" not in name)
        fields += ["score"] * name.startswith(("reward", "gold"))
        fields += ["ratings"] * (name == "reward_training_data_eval")
        files[name] = [{field: record[field] for field in fields} for record in part]
    for name in ("rlhf_training_data", "rlhf_training_data_eval"):  # many begin with "It 's a"
        files[name] = [{"user_input": text}
                       for text in dict.fromkeys(record["user_input"] for record in files[name])]
    return files


def download(args):
    """The command."""
    with explain(f"{SDIST}: not what it should hold"):
        reviews = read_reviews(*fetch())
    number = sum(len(ratings) for _, ratings in reviews)
    print(f"{len(reviews)} sentences of film reviews, with {number} ratings")
    files = {os.path.join(args.out, f"{name}.json"): records
             for name, records in sets_of_reviews(reviews, args.seed).items()}
    save_all(files, args.overwrite)
