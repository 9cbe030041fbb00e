"""
Every attention head of a checkpoint measured: the rows of heads.csv and spectra.csv.
"""
from nanorank.errors import UserError
from nanorank.prefetch import read_ahead
from nanorank.regulariser import gaussian_planes, measure_product, products_of, regulariser_of, rope_in
from nanorank.spectra import gaussian_nuclear


def head_rows(ckpt, device, threshold=0.95, exact=False, done=lambda part: None):
    """(rows of heads.csv, rows of spectra.csv) of a checkpoint, a dict for each head and product.

    Where queries share keys, qk_stacked and ov_stacked have a row for each key/value head.
    Raises UserError for NaN or inf, naming checkpoint, layer, product and head.
    """
    rows, spectra = [], []
    modules = ckpt.modules()
    for layer in read_ahead(ckpt.attention_layer, modules):
        for product, (A, B) in products_of(layer).items():
            A, B = A.to(device), B.to(device)
            try:
                s, metrics, planes = measure_product(layer, product, A, B, threshold, exact)
            except UserError as error:
                where = f"{layer.stack} layer {layer.layer}".strip()
                raise UserError(f"{ckpt.path}: {where}, {product}: {error}") from None

            # the norms of the product of random factors of norm 1 of the same shapes
            shape = A.shape[-2], B.shape[-2], A.shape[-1]
            random = gaussian_nuclear(*shape)
            turning = rope_in(layer, product).dim if planes else 0
            random_planes = gaussian_planes(*shape, turning) if planes else 0.0
            for head, values in enumerate(s.tolist()):
                key = {"checkpoint": ckpt.path, "step": ckpt.step, "stack": layer.stack,
                       "layer": layer.layer, "head": head, "product": product, "d_head": A.shape[-1]}
                row = {name: column[head] for name, column in metrics.items()}
                half = row["half_sq_norm"]
                a, b = row["norm_A"], row["norm_B"]
                row["gap_gaussian"] = 1 - random * a * b / half if half else 0.0
                row["regulariser"] = regulariser_of(layer, product)
                if planes:
                    row["planes"] = turning // 2
                    row.update({name: column[head] for name, column in planes.items()})
                    row["gap_planes_gaussian"] = 1 - random_planes * a * b / half if half else 0.0
                rows.append({**key, **row})
                spectra.append({**key, **{f"s{i}": x for i, x in enumerate(values, 1)}})
        done(1 / len(modules))
    return rows, spectra
