"""
Every attention head of a checkpoint measured: the rows of heads.csv and spectra.csv.
"""
from nanorank.errors import UserError
from nanorank.prefetch import read_ahead
from nanorank.spectra import factors_of, gaussian_nuclear, measure


def head_rows(ckpt, device, threshold=0.95, exact=False, done=lambda part: None):
    """(rows of heads.csv, rows of spectra.csv) of a checkpoint, a dict for each head and product.

    Raises UserError for NaN or inf, naming checkpoint, layer, product and head.
    """
    rows, spectra = [], []
    modules = ckpt.modules()
    for layer in read_ahead(ckpt.attention_layer, modules):
        for product, (A, B) in factors_of(layer).items():
            try:
                s, metrics = measure(A.to(device), B.to(device), threshold, exact)
            except UserError as error:
                where = f"{layer.stack} layer {layer.layer}".strip()
                raise UserError(f"{ckpt.path}: {where}, {product}: {error}") from None

            # the nuclear norm of random factors of norm 1 of the same shapes
            baseline = gaussian_nuclear(A.shape[-2], B.shape[-2], A.shape[-1])
            for head, values in enumerate(s.tolist()):
                key = {"checkpoint": ckpt.path, "step": ckpt.step, "stack": layer.stack,
                       "layer": layer.layer, "head": head, "product": product, "d_head": A.shape[-1]}
                row = {name: column[head] for name, column in metrics.items()}
                half = row["half_sq_norm"]
                random = baseline * row["norm_A"] * row["norm_B"]
                row["gap_gaussian"] = 1 - random / half if half else 0.0
                rows.append({**key, **row})
                spectra.append({**key, **{f"s{i}": x for i, x in enumerate(values, 1)}})
        done(1 / len(modules))
    return rows, spectra
