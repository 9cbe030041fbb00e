"""
Draws a figure from CSV files: PNG and PDF beside the file, or in the folder, that it was drawn from.

    python -m scripts.figures heads results/demo/heads.csv
    python -m scripts.figures over_training results/wd_grid
    python -m scripts.figures all                             # every figure under results/

From analyze.py:
    heads heads.csv            rank of every head by layer, and over training
    nuclear_norm heads.csv     against the norms of the factors
    heatmap heads.csv          rank, layer x head
    spectra spectra.csv        singular values, a line a layer
    norms norms.csv            norms, directions over training
    report FOLDER              report.html: every head in the browser (needs plotly)

From scripts/sweep.py; the first two also from a heads.csv of several runs:
    rank_by_layer sweep.csv    rank against attn_wd
    mean_rank sweep.csv        its mean over layers
    wd_grid sweep.csv          perplexity over attn_wd x mlp_wd
    norm_growth sweep.csv      over learning rate x attn_wd
    over_training FOLDER       of a sweep, or of run folders
    difference_over_training FOLDER     validation loss without decay on attention minus with it
    attention_kinds FOLDER     of a sweep over rope, qk_norm, n_kv_head with a heads.csv of its runs

From scripts/theory.py, config/recall.py and scripts/saturate.py:
    factorised_models FOLDER   balance, soft thresholding, AdamW
    two_parameters FOLDER      trajectories over the loss
    attention_balance FOLDER   how fast a transformer's factors become balanced
    recall FOLDER              associative recall over weight decay
    saturation saturation.csv, heads_saturated heads_saturated.csv, scaling scaling.csv

From scripts/pretrained.py, of its heads.csv and the models.csv beside it:
    pretrained heads.csv       gap and rank of every head of every model beside Gaussian factors
    factors heads.csv          half the squared norms of the factors against the norm that L2 becomes

`all` draws each results/*/FIGURE.png again from the file beside it, and where a sweep.csv lies, all that the
grid allows. A figure whose file is missing is named and stays as it is.
"""
import os
import sys

from nanorank.errors import UserError, user_errors
from nanorank.figures import attention_kinds, heads, pretrained, report, saturation, sweep, theory

# {file, or the folder itself: the figures that are drawn from it}
SOURCES = {
    "heads.csv": (heads.heads, heads.nuclear_norm, heads.heatmap, sweep.rank_by_layer, sweep.mean_rank,
                  pretrained.pretrained, pretrained.factors),
    "spectra.csv": (heads.spectra,),
    "norms.csv": (heads.norms,),
    "sweep.csv": (sweep.rank_by_layer, sweep.mean_rank, sweep.wd_grid, sweep.norm_growth),
    ".": (report.report, sweep.over_training, sweep.difference_over_training, attention_kinds.attention_kinds,
          theory.factorised_models, theory.two_parameters, theory.attention_balance, theory.recall),
    "saturation.csv": (saturation.saturation,),
    "heads_saturated.csv": (saturation.heads_saturated,),
    "scaling.csv": (saturation.scaling,),
}
FIGURES = {draw.__name__: draw for draws in SOURCES.values() for draw in draws}


def everything(root="results"):
    """Draws all figures under root again: (the PNGs' paths, a line for each figure that lacks its file)."""
    drawn, left = [], []
    for folder, _, files in sorted(os.walk(root)):
        if "sweep.csv" in files:
            drawn += sweep.sweep(folder)
        for name, draw in FIGURES.items():
            png = os.path.join(folder, f"{name}.png")
            if f"{name}.png" not in files or png in drawn:
                continue
            sources = [source for source, draws in SOURCES.items() if draw in draws]
            sources.sort(key=lambda source: source not in files)  # first what is there
            try:
                drawn.append(draw(os.path.normpath(os.path.join(folder, sources[0]))))
            except (UserError, OSError) as error:
                left.append(f"{png} stays as it is: {error}")
    return drawn, left


def main():
    args = sys.argv[1:]
    if args in (["--help"], ["-h"]):
        print(__doc__.strip())
    elif args == ["all"]:
        drawn, left = everything()
        print("\n".join(drawn))
        print("\n".join(left), file=sys.stderr, end="\n" if left else "")
    elif len(args) == 2 and args[0] in FIGURES:
        print(FIGURES[args[0]](args[1]))
    else:
        raise UserError(f"usage: python -m scripts.figures all, or {'|'.join(FIGURES)} FILE.csv or FOLDER")


if __name__ == "__main__":
    with user_errors("figures.py"):
        main()
