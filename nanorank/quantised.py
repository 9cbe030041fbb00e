"""
Tells weights that are quantised from weights that can be measured, before anything else is asked of them.

    refuse_quantised(ckpt.tensors, ckpt.configs)    # raises UserError: the tensor, the method, the fix
"""
import re

from nanorank.errors import UserError

# {what stands beside or in place of a Linear's weight: the method}
MARKS = {
    r"weight\.quant_state\.bitsandbytes__\w+": "bitsandbytes, 4 bits",
    r"weight\.(absmax|quant_map|nested_absmax)": "bitsandbytes, 4 bits",
    r"(weight\.)?(SCB|weight_format)": "bitsandbytes, 8 bits",
    r"qweight|qzeros": "GPTQ or AWQ",
    r"weight_packed|weight_shape": "compressed-tensors",
    r"weight_scale(_inv)?|weight_scale_2|input_scale|weight_zero_point": "fp8 or int8 with scales",
    r"W_q|meta\.scale": "HQQ",
    r"(codes|codebooks|scales_and_zp|int_data)": "AQLM or torchao",
    r"weight_(blocks|scales)|\w+_blocks": "mxfp4",
    r"_packed_params\._packed_params|_packed_params": "torch.ao, int8",
}
FLOAT = re.compile(r"(float|bfloat|F|BF)(16|32|64)$")
ATTENTION = r"attn|attention|(^|[._])(q|k|v|o|qkv|query|key|value|wq|wk|wv|wo)(_proj|_lin)?[._]"
FIX = ("dequantise it first, or take the model it was made from: transformers' "
       "from_pretrained(FOLDER).dequantize(), then save_pretrained(OUT)")


def refuse_quantised(tensors, configs):
    """Raises UserError where attention's weights are quantised, by the names beside them.

    tensors: {name: Stored}. Experts alone in fewer bits (gpt-oss) do not matter: only attention is measured.
    """
    for name, x in tensors.items():
        if re.search(r"norm", name) or not re.search(ATTENTION, name):
            continue
        for tail, method in MARKS.items():
            match = re.search(rf"(?:^|\.)({tail})$", name)
            if match and beside_quantised(name[:match.start(1)], tail, tensors):
                method = method_of(configs) or method
                raise UserError(f"{name}: quantised ({method}), stored as {x.dtype}; {FIX}")


def beside_quantised(path, tail, tensors):
    """Whether a mark is one: W_q is a name of plain weights too, and scales may stand beside floats."""
    if tail.startswith(("W_q", "(codes")):
        return any(not FLOAT.match(tensors[name].dtype) for name in tensors if name.startswith(path))
    weight = tensors.get(f"{path}weight")
    return weight is None or not FLOAT.match(weight.dtype) or "SCB" in tail


def refuse_stored_quantised(modules, tensors):
    """Raises UserError where a tensor of attention is stored in a type that is no plain float."""
    for module in modules:
        for name in module.tensor_names:
            dtype = tensors[name].dtype
            if not FLOAT.match(dtype):
                raise UserError(f"{name} is stored as {dtype}, quantised: {FIX}")


def method_of(configs):
    """The method that a config.json names, else an empty string."""
    for config in dict(configs).values():
        quantised = config.get("quantization_config")
        if isinstance(quantised, dict) and isinstance(quantised.get("quant_method"), str):
            return quantised["quant_method"]
    return ""
