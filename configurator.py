"""
The settings block at the top of a script is its command line.

    # settings
    learning_rate = 1e-3  # peak learning rate
    out_dir = "out"       # folder of the run

    if __name__ == "__main__":
        configure(globals())       # then main() reads the globals

    python script.py config/a.py config/b.py --learning_rate=3e-4 --out-dir out/x

A setting is a module-level, lower-case name bound to a literal; the comment behind it is its help text. Config files hold
nothing but such assignments (and a docstring); they are parsed, never executed. Files and flags apply left to right.
Wrong input ends the script with one line and exit status 2. A script can be imported as well: set its globals, call main().
"""
import ast
import difflib
import io
import os
import re
import sys
import tokenize


class UserError(ValueError):
    """What the user gave is wrong; the message names it and the fix. Scripts print it as one line and exit with status 2."""


TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def configure(settings, positional="", argv=None):
    """Overrides the settings in `settings` (a script's `globals()`) from config files and flags.

    positional: how --help names the other arguments ("CKPT [CKPT ...]"); empty: the script takes none.
    argv: the arguments, `sys.argv[1:]` by default. Returns the other arguments, a list of strings.
    Raises SystemExit(2) after one line on stderr for wrong input, SystemExit(0) after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = os.path.basename(settings["__file__"])
    defaults = script_settings(settings)
    others = []
    try:
        while argv:
            arg = argv.pop(0)
            if arg in ("--help", "-h"):
                print(usage(settings, positional), end="")
                raise SystemExit(0)
            if arg == "--":
                others += argv
                break
            if arg.startswith("--"):
                name, equals, text = arg[2:].partition("=")
                name = known(name.replace("-", "_"), defaults, f"--{name}")
                if not equals:
                    text = value_of_flag(name, defaults[name], argv)
                settings[name] = parse(f"--{name}", defaults[name], text)
            elif arg.endswith(".py"):
                for name, value, where in read_config(arg):
                    name = known(name, defaults, f"{where}: {name}")
                    settings[name] = convert(f"{where}: {name}", defaults[name], value)
            else:
                others.append(arg)
        if others and not positional:
            raise UserError(f"unexpected argument {others[0]!r}: settings are --name=value, config files end in .py")
    except UserError as error:
        print(f"{script}: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    return others


def one_line(error, most=1000):
    """An error's message as one line of at most `most` characters: names from strangers' files hold line breaks and terminal codes."""
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(error)).strip()
    return text if len(text) <= most else f"{text[:most - 4]} ..."


def current(settings):
    """The settings of a script as they are now, {name: value}: what a run prints, logs and stores."""
    return {name: settings[name] for name in script_settings(settings)}


def script_settings(settings):
    """{name: default} of the settings in the script whose `globals()` are given, read from its source."""
    with tokenize.open(settings["__file__"]) as file:
        return {name: value for name, value, _ in assignments(file.read()) if value is not NotImplemented}


def assignments(source):
    """(name, literal value or NotImplemented, line number) of each module-level `name = ...` with a public lower-case name."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name == name.lower() and not name.startswith("_"):
                yield name, literal(node.value), node.lineno


def literal(node):
    """The value of a literal expression, arithmetic on numbers included (`600 * 4`, `-1e-3 / 3`); else NotImplemented."""
    if isinstance(node, ast.BinOp):
        a, b = literal(node.left), literal(node.right)
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            try:
                match node.op:
                    case ast.Add(): return a + b
                    case ast.Sub(): return a - b
                    case ast.Mult(): return a * b
                    case ast.Div(): return a / b
                    case ast.FloorDiv(): return a // b
            except ArithmeticError:
                pass
        return NotImplemented
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return NotImplemented


def read_config(path):
    """(name, value, "file:line") of each assignment in a config file. Raises UserError where it holds anything else."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        body = ast.parse(source).body
    except (OSError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as error:  # LookupError: rot13 is no encoding of text
        reason = error.strerror if isinstance(error, OSError) else f"line {getattr(error, 'lineno', '?')}: {error.args[0]}"
        raise UserError(f"config file {path}: {reason}") from None
    for i, node in enumerate(body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        plain = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        if docstring:
            continue
        value = literal(node.value) if plain else NotImplemented
        if value is NotImplemented:
            raise UserError(f"{path}:{node.lineno}: a config file holds only lines `name = literal`, "
                             f"not `{source.splitlines()[node.lineno - 1].strip()}`")
        yield node.targets[0].id, value, f"{path}:{node.lineno}"


def known(name, defaults, where):
    if name in defaults:
        return name
    near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.5)
    raise UserError(f"unknown setting {where}" + (f"; did you mean {near[0]}?" if near else "; --help lists them all"))


def value_of_flag(name, default, argv):
    """The text of `--name value`, taken from argv; "true" for a bare switch (settings that are bool, or "auto" by default)."""
    bare = not argv or argv[0].startswith("--")
    if isinstance(default, bool) and (bare or argv[0].lower() not in TRUE + FALSE) or default == "auto" and bare:
        return "true"
    if bare:
        raise UserError(f"--{name} needs a value ({kind(default)})")
    return argv.pop(0)


def kind(default):
    return {bool: "true or false", int: "an int", float: "a float", str: "a string"}.get(type(default), f"a {type(default).__name__}")


def parse(where, default, text):
    """The value that `text` from the command line has for a setting with this default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise UserError(f"{where} expects {kind(default)}, got {text!r}")
    try:
        value = literal(ast.parse(text.strip(), mode="eval").body)
        value = float(text) if value is NotImplemented else value  # inf
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"{where} expects {kind(default)}, got {text!r}") from None
    return convert(where, default, value)


def convert(where, default, value):
    """`value` in the type of `default`: an int for a float and 1e5 for an int are taken, anything else is refused."""
    if isinstance(default, float) and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is type(default) and value == value:  # nan is nobody's setting
        return value
    raise UserError(f"{where} expects {kind(default)}, got {value!r}")


def usage(settings, positional=""):
    """What --help prints: the script's docstring, then every setting with its default and comment, under its banners."""
    source = open(settings["__file__"], encoding="utf-8").read()
    comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokenize.generate_tokens(io.StringIO(source).readline)
                if t.type == tokenize.COMMENT}
    code = source.splitlines()
    rows, last = [], 0
    for name, default, line in assignments(source):
        if default is NotImplemented:
            continue
        for i in range(last + 1, line):  # comment lines of their own between two settings are banners
            if last and i in comments and code[i - 1].startswith("#") and comments[i].strip("-= "):
                rows.append(f"\n{comments[i].strip('-= ')}:")
        default = f'"{default}"' if isinstance(default, str) else default
        rows.append(f"  --{name}={default}".ljust(34) + "  " + comments.get(line, ""))
        last = line
    doc, script = (settings.get("__doc__") or "").strip("\n"), os.path.basename(settings["__file__"])
    script = f"-m scripts.{script.removesuffix('.py')}" if settings.get("__package__") == "scripts" else script
    use = f"usage: python {script} [config/x.py ...] [--setting=value ...] {positional}".rstrip()
    return "\n".join([doc, "", use, "", "settings:", *rows, ""])
