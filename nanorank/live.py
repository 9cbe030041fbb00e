"""
A model in memory, seen as a checkpoint is: clean names, whole shapes and tensors, attention heads.

    live = LiveModel(model)
    for layer in live.attention_layers():    # one layer's tensors at a time
        layer.W_Q     # (H, r, d), likewise W_K, W_V; layer.P is (H, d, r)

The model may be wrapped by DDP, FSDP (with use_orig_params), fully_shard, torch.compile, activation
checkpointing. Sharded parameters are gathered layer by layer, which all processes must do together.
"""
import contextlib
import re
import sys

from nanorank.checkpoints import WRAPPERS
from nanorank.errors import UserError
from nanorank.families import find_attention
from nanorank.heads import HEAD_KEYS, heads_of, join, split_heads
from nanorank.positions import refuse_contradiction, with_positions

# peft keeps a layer's own weight as base_layer or original_module, and trained copies as modules_to_save.NAME
PEFT = r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.|$)"


def clean_name(name):
    """A name without what wrappers add: module.layers.0._orig_mod.fc.weight -> layers.0.fc.weight."""
    parts = [part for part in name.split(".") if part not in (*WRAPPERS, "_checkpoint_wrapped_module")]
    return re.sub(PEFT, "", ".".join(parts))


@contextlib.contextmanager
def without_dashes():
    """In errors that name a flag of analyze.py, the argument: n_head for --n_head."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--", "")) from None


class LiveModel:
    """The attention of a torch.nn.Module."""

    def __init__(self, model, n_head=0, n_kv_head=0, d_head=0, pattern="", layout="separate",
                 rope=""):
        """n_head, n_kv_head, d_head: heads, where the model does not say.
        pattern, layout: names that no scheme knows (families.find_attention).
        rope: half, interleaved, none or half:64, where nothing tells whether q and k turn (positions.py).
        Raises UserError where no attention is found, or nothing tells the number of heads."""
        self.model = model
        self.n_kv_head = n_kv_head
        self.rope = rope
        self.parts = {clean_name(name): part for name, part in model.named_modules(remove_duplicate=False)}
        self.units = fsdp_units(model)
        shapes = self.shapes = whole_shapes(model)
        with without_dashes():
            self.modules = find_attention(shapes, pattern, layout, model_config(model))
            for module in self.modules:
                refuse_contradiction([module], shapes, self.configs_of(module), rope)
            self.heads = {}  # by the module's path
            for module in self.modules:
                configs = self.configs_of(module)
                self.heads[module.path], _ = heads_of(module, shapes, configs, n_head, n_kv_head, d_head)

    def configs_of(self, module):
        """{source: dict} of what may count a module's heads: its attributes, then configs, nearest first."""
        configs = {}
        own = self.parts.get(module.path)
        attributes = {key: getattr(own, key, None) for key in HEAD_KEYS}
        configs[module.path] = {key: x for key, x in attributes.items() if type(x) is int}

        path = module.path
        while True:
            config = config_of(self.parts.get(path))
            if config:
                configs[join(path, "config")] = config
            if not path:
                return configs
            path = path.rpartition(".")[0]

    def attention_layer(self, module):
        """The AttentionLayer of a module, as the weights are now."""
        units = {}  # of FSDP, outer before inner
        for name in module.tensor_names:
            path = name
            while path and path not in self.units:
                path = path.rpartition(".")[0]
            if path in self.units:
                units[path] = self.units[path]

        with contextlib.ExitStack() as gathered:
            for unit in units.values():
                gathered.enter_context(whole(unit))
            parameters = named_parameters(self.model)
            tensors = {}
            for name in module.tensor_names:
                p = parameters[name].detach()
                if hasattr(p, "full_tensor"):  # a DTensor
                    p = p.full_tensor()
                tensors[name] = p.clone() if units else p
        layer = split_heads(module, tensors, self.heads[module.path], self.n_kv_head)
        return with_positions(layer, module, self.shapes, self.configs_of(module), self.rope)

    def attention_layers(self):
        """Yields the AttentionLayer of each layer, gathered when it is asked for."""
        for module in self.modules:
            yield self.attention_layer(module)


def named_parameters(model):
    """{clean name: parameter}, tied weights under each of their names."""
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def config_of(part):
    """A module's own `config` or `args` as a dict, empty where it has none."""
    for name in ("config", "args"):
        value = getattr(part, name, None)
        if hasattr(value, "to_dict"):  # Hugging Face
            return value.to_dict()
        if isinstance(value, dict):
            return value
        if hasattr(value, "__dict__"):
            return vars(value)
    return {}


def model_config(model):
    """The first config in a model, from the outside in."""
    for part in model.modules():
        config = config_of(part)
        if config:
            return config
    return {}

# ------------------------------------------------------------ FSDP

def fsdp_units(model):
    """{clean path: module} of what FullyShardedDataParallel wraps, outer before inner."""
    if "torch.distributed.fsdp" not in sys.modules:  # slow to import
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel
    units = {}
    for name, part in model.named_modules():
        if isinstance(part, FullyShardedDataParallel):
            units[clean_name(name)] = part
    return units


def whole(unit):
    """A context in which a unit's own parameters, sharded and flat outside, are whole."""
    return type(unit).summon_full_params(unit, recurse=False, writeback=False)


def whole_shapes(model):
    """{clean name: shape} of all parameters, as they are without sharding.

    Raises UserError where FSDP has merged parameters into flat ones.
    """
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model).items()}
    for name in shapes:
        if name.endswith("_flat_param"):
            raise UserError(f"{name} holds several parameters: wrap by FSDP with use_orig_params=True")
    for path, unit in fsdp_units(model).items():
        with whole(unit):
            for name, p in named_parameters(unit).items():
                shapes[join(path, name)] = tuple(p.shape)
    return shapes
