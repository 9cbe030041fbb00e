"""
How the heads lie in the weights of q, k, v and the output projection o, layout by layout.

    q, k, v, o = UNSTACK["fused"]([qkv, o], n_head)    # each out x in, heads contiguous

H: heads, r: width of a head, d: width of the model, n: key/value heads.
"""
from nanorank.errors import UserError

LAYOUTS = {
    "separate": "q, k, v, o each a Linear's weight, out x in, heads contiguous "
                "(with {head} in a name: one Linear per head)",
    "fused": "q, k and v (or k and v) stacked on top of each other in one weight, out x in, "
             "heads contiguous in each",
    "conv": "as fused, or the transpose of it, told by which side is longer (GPT-2's Conv1D is in x out)",
    "grouped": "per key/value head: its queries, its key, its value, then the next; "
               "one query head each: interleaved per head",
    "gated": "as separate, with each head's query followed by a gate of its width in q",
    "lens": "(head, d_model, d_head) for q, k, v and (head, d_head, d_model) for o, "
            "or the older order with the last two exchanged, o also (d_model, head * d_head)",
    "mla": "q per head: its part without position, its rotary part; kv per head: its key, its value "
           "(DeepSeek's multi-head latent attention)",
    "codegen": "four blocks of queries, values, keys",
}

# each takes the tensors of a module and the number of heads, and returns q, k, v, o, each out x in

def unstack_separate(parts, n_head):
    return parts


def unstack_fused(parts, n_head):
    *q, stacked, o = parts
    if stacked.ndim == 3:  # (3, H r, d)
        stacked = stacked.flatten(0, 1)
    if q:  # q, kv, o
        k, v = stacked.chunk(2)
        return q[0], k, v, o
    r = o.shape[1] // n_head
    n = (stacked.shape[0] // r - n_head) // 2
    q, k, v = stacked.split([n_head * r, n * r, n * r])
    return q, k, v, o


def unstack_conv(parts, n_head):
    stacked = parts[-2]
    if stacked.shape[0] < stacked.shape[1]:
        parts = [part.T for part in parts]
    return unstack_fused(parts, n_head)


def unstack_grouped(parts, n_head):
    qkv, o = parts
    r = o.shape[1] // n_head
    n = (qkv.shape[0] // r - n_head) // 2
    qkv = qkv.reshape(n, n_head // n + 2, r, -1)  # a group: its queries, its key, its value
    q = qkv[:, :-2].flatten(0, 2)
    k = qkv[:, -2].flatten(0, 1)
    v = qkv[:, -1].flatten(0, 1)
    return q, k, v, o


def unstack_gated(parts, n_head):
    q, k, v, o = parts
    queries, _ = q.unflatten(0, (n_head, 2, -1)).unbind(1)  # a head: its query, its gate
    return queries.flatten(0, 1), k, v, o


def unstack_mla(parts, n_head):
    q, kv, o = parts
    r_v = o.shape[1] // n_head
    r = kv.shape[0] // n_head - r_v
    q = q.unflatten(0, (n_head, -1))[:, :r]    # without the rotary part
    kv = kv.unflatten(0, (n_head, -1))
    if r < 1 or q.shape[1] < r:
        raise UserError("kv holds no key beside each value")
    return q.flatten(0, 1), kv[:, :r].flatten(0, 1), kv[:, r:].flatten(0, 1), o


def unstack_lens(parts, n_head):
    q, k, v, o = parts
    if o.ndim == 2:
        return flat_output(q, k, v, o)
    if q.shape[1] >= q.shape[2]:  # (H, d, r), and o (H, r, d)
        q, k, v, o = q.mT, k.mT, v.mT, o.mT
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), o.transpose(0, 1).flatten(1)


def flat_output(q, k, v, o):
    """q, k, v (H, r, d) with o (d, H r), or q, k, v (H, d, r) with o (H r, d)."""
    if q.shape[1] >= q.shape[2]:
        q, k, v, o = q.mT, k.mT, v.mT, o.T
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), o


def unstack_codegen(parts, n_head):
    qkv, o = parts
    blocks = qkv.reshape(4, 3, qkv.shape[0] // 12, -1)  # four blocks of q, v, k
    q, v, k = blocks.transpose(0, 1).flatten(1, 2)
    return q, k, v, o


UNSTACK = {
    "separate": unstack_separate,
    "fused": unstack_fused,
    "conv": unstack_conv,
    "grouped": unstack_grouped,
    "gated": unstack_gated,
    "lens": unstack_lens,
    "mla": unstack_mla,
    "codegen": unstack_codegen,
}
