"""What has to be known of a Dockerfile before it is built: the names on its FROM lines.

Owns: finding those lines and putting other names on them. Everything else of the language is buildah's; a mistake here can only make
a build fail.
"""

import re

from .report import WrongInput

# Longest Dockerfile, bytes.
LONGEST = 1 << 20
HEREDOC = re.compile(r"(?:^|\s)\d*<<(-?)([\"']?)([^\s<>|&;\"'()]+)\2(?=$|[\s|&;>)])")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})")


def read(path):
    """The file as text."""
    with open(path, "rb") as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise WrongInput(f"The Dockerfile is longer than {LONGEST} bytes.")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise WrongInput("The Dockerfile is not UTF-8 text.") from error


def instructions(text):
    """(first line, end line, instruction) for each; heredocs are part of nothing."""
    lines = text.split("\n")
    escape, number = "\\", 0
    while number < len(lines) and (directive := re.match(r"#\s*(\w+)\s*=\s*(\S+)\s*$", lines[number])):
        if directive[1].lower() == "escape":
            escape = directive[2]
        number += 1
    while number < len(lines):
        first, parts = number, []
        while number < len(lines):
            line = lines[number]
            number += 1
            if re.match(r"\s*(#|$)", line):
                if not parts:
                    break
                continue
            stripped = line.rstrip()
            if not stripped.endswith(escape):
                parts.append(stripped)
                break
            parts.append(stripped[: -len(escape)])
        instruction = " ".join(parts).strip()
        if not instruction:
            continue
        yield first, number, instruction
        if re.match(r"(run|copy|add)\s", instruction, re.IGNORECASE):
            for dash, _, word in HEREDOC.findall(instruction):
                while number < len(lines) and (lines[number].lstrip("\t") if dash else lines[number]) != word:
                    number += 1
                number += 1


def expand(text, values):
    """The text with variables replaced as in a FROM line."""

    def value(match):
        known = values.get(match[1] or match[2], "")
        if match[3] == "-":
            return known or match[4]
        return (match[4] if known else "") if match[3] == "+" else known

    return VARIABLE.sub(value, text)


def with_names(text, known):
    """The Dockerfile with each FROM line's template replaced by what `known` has for it, and the names of its stages. WrongInput for
    every other name."""
    lines, values, stages = text.split("\n"), {}, set()
    found = False
    for first, end, instruction in list(instructions(text)):
        word, _, rest = instruction.partition(" ")
        if word.upper() == "ARG" and not found:
            for name, has, default in (item.partition("=") for item in rest.split()):
                values[name] = expand(default.strip("\"'"), values) if has else values.get(name, "")
        if word.upper() != "FROM":
            continue
        found = True
        flags, words = [item for item in rest.split() if item.startswith("--")], [item for item in rest.split() if not item.startswith("--")]
        if not words:
            raise WrongInput(f"Line {first + 1} of the Dockerfile: FROM names nothing.")
        name = expand(words[0].strip("\"'"), values)
        if name.lower() not in stages and name != "scratch":
            if name not in known:
                allowed = ", ".join(sorted(known)) or "none"
                raise WrongInput(f"Line {first + 1} of the Dockerfile: FROM {name}: only templates ({allowed}), earlier stages and scratch "
                                 "can be built on; an image of a registry can be made a template by uploading it first.")
            lines[first:end] = [" ".join(["FROM", *flags, known[name], *words[1:]])] + [""] * (end - first - 1)
        if len(words) == 3 and words[1].upper() == "AS":
            stages.add(words[2].lower())
    if not found:
        raise WrongInput("The Dockerfile has no FROM line.")
    return "\n".join(lines), stages
