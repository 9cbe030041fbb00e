"""
CSV in, figures out: one function a figure, PNG and PDF beside the CSV it was drawn from.

    python -m scripts.figures heads out/analysis/heads.csv      # rank of every head by layer (F3a), and over training
    python -m scripts.figures nuclear_norm out/analysis/heads.csv         # half_sq_norm against nuclear, norms of the factors (F4)
    python -m scripts.figures heatmap out/analysis/heads.csv    # rank of every head, layer x head
    python -m scripts.figures spectra out/analysis/spectra.csv  # singular values, a line a layer
    python -m scripts.figures norms out/analysis/norms.csv      # norms and directions over training (N1, N2)
    python -m scripts.figures factorised_models out/factored                   # theory: balance, soft thresholding, depth, AdamW (scripts/theory.py); f5: scalars
    python -m scripts.figures recall out/recall                     # associative recall: the runs in this folder's folders, over their weight decay
    python -m scripts.figures rank_by_layer out/sweep/sweep.csv           # rank against attn_wd by layer (F3a); f3b: mean over all; or from a heads.csv
    python -m scripts.figures wd_grid out/sweep/sweep.csv            # heatmap over attn_wd x mlp_wd (T1); n3: norm growth over learning rate x decay (N3)
    python -m scripts.figures over_training out/sweep           # rank and validation against step, a line a decay; or of run folders
    python -m scripts.figures saturation out/saturation/saturation.csv              # N5: by layer, and over training beside the parameter norm
    python -m scripts.figures heads_saturated out/saturation/heads_saturated.csv    # N6: what heads attend to; and N4: scaling, of scaling.csv
    python -m scripts.figures all                               # every figure under results/

all: results/NAME/FIGURE.png is drawn again from what lies beside it, the file that FIGURE reads above (a folder: the files that its script
writes there); where sweep.csv lies, whatever the grid allows. What lacks its file stays as it is, and is named.
"""
import os
import sys

from nanorank.errors import UserError, user_errors
from nanorank.figures.heads import heads, heatmap, norms, nuclear_norm, spectra
from nanorank.figures.saturation import heads_saturated, saturation, scaling
from nanorank.figures.sweep import mean_rank, norm_growth, over_training, rank_by_layer, sweep, wd_grid
from nanorank.figures.theory import factorised_models, recall, two_parameters


def everything(root="results"):
    """Draws all figures under results/ again; returns (the PNGs' paths, a line for each that lacks what it is drawn from)."""
    drawn, left = [], []
    for folder, _, files in sorted(os.walk(root)):
        if "sweep.csv" in files:
            drawn += sweep(folder)
        for name, draw in FIGURES.items():
            png = os.path.join(folder, f"{name}.png")
            if f"{name}.png" in files and png not in drawn:
                beside = [os.path.normpath(os.path.join(folder, file)) for file in SOURCES.get(name, ("heads.csv",))]
                try:
                    drawn.append(draw(next((path for path in beside if os.path.exists(path)), beside[0])))
                except (ValueError, OSError) as error:
                    left.append(f"{png} stays as it is: {error}")
    return drawn, left


FIGURES = {"heads": heads, "nuclear_norm": nuclear_norm, "heatmap": heatmap, "spectra": spectra, "norms": norms, "factorised_models": factorised_models, "recall": recall, "two_parameters": two_parameters,
           "rank_by_layer": rank_by_layer, "mean_rank": mean_rank, "wd_grid": wd_grid, "norm_growth": norm_growth, "over_training": over_training,
           "saturation": saturation, "heads_saturated": heads_saturated, "scaling": scaling}
SOURCES = {"spectra": ("spectra.csv",), "norms": ("norms.csv",), "factorised_models": (".",), "recall": (".",), "two_parameters": (".",), "over_training": (".",),
           "rank_by_layer": ("heads.csv", "sweep.csv"), "mean_rank": ("heads.csv", "sweep.csv"), "wd_grid": ("sweep.csv",), "norm_growth": ("sweep.csv",),
           "saturation": ("saturation.csv",), "heads_saturated": ("heads_saturated.csv",), "scaling": ("scaling.csv",)}  # else heads.csv


if __name__ == "__main__":
    with user_errors("figures.py"):
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__.strip())
        elif sys.argv[1:] == ["all"]:
            drawn, left = everything()
            print("\n".join(drawn))
            print("".join(f"{line}\n" for line in left), end="", file=sys.stderr)
        elif len(sys.argv) == 3 and sys.argv[1] in FIGURES:
            print(FIGURES[sys.argv[1]](sys.argv[2]))
        else:
            raise UserError(f"usage: python -m scripts.figures all, or {'|'.join(FIGURES)} FILE.csv or FOLDER")
