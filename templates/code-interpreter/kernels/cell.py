"""What a cell writes, from the messages of its kernel to one bounded answer.

Owns: limits, plain text, MIME bundles as strings. Knows no kernel and no socket.
"""

import json
import re

# Bytes of UTF-8 that are kept of each text stream, of all results together as JSON, and of a traceback.
STREAM_BYTES = 1 << 20
RESULT_BYTES = 8 << 20
RESULTS = 256
ERROR_BYTES = 64 << 10

# Sequences that move a cursor or colour a text.
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def plain(text):
    return ANSI.sub("", text)


def shortened(text, limit):
    """The beginning of a text, at most `limit` bytes as UTF-8 and never half a character."""
    # A lone surrogate is no character, and no JSON text that others read.
    raw = text.encode("utf-8", "replace")
    return raw[:limit].decode("utf-8", "ignore")


class Text:
    """One stream of a cell. Its kernel writes `mark` into it behind everything that the cell wrote."""

    def __init__(self, mark):
        self.mark = mark
        self.marked = not mark
        self.truncated = False
        self.parts, self.size, self.held = [], 0, ""

    def add(self, text):
        if self.mark:
            text, self.held = self.held + text, ""
            before, found, after = text.partition(self.mark)
            if found:
                self.marked = True
                text = before + after
            else:
                # The mark may come in two pieces.
                start = text.rfind(self.mark[0], max(0, len(text) - len(self.mark) + 1))
                if start >= 0 and self.mark.startswith(text[start:]):
                    text, self.held = text[:start], text[start:]
        self.keep(text)

    def keep(self, text):
        if self.truncated or not text:
            return
        kept = shortened(text, STREAM_BYTES - self.size)
        size = len(kept.encode())
        self.truncated = size < len(text.encode("utf-8", "replace"))
        self.parts.append(kept)
        self.size += size

    def clear(self):
        self.parts, self.size, self.truncated = [], 0, False

    def whole(self):
        self.keep(self.held)
        self.held = ""
        return "".join(self.parts)


class Cell:
    """The output of one request."""

    def __init__(self, request, mark=""):
        self.request = request
        self.streams = {"stdout": Text(mark), "stderr": Text(mark)}
        self.bundles, self.places, self.bytes = [], {}, 0
        self.lost = False
        self.error = None
        self.idle = False
        self.clearing = False

    @property
    def complete(self):
        return self.idle and all(stream.marked for stream in self.streams.values())

    @property
    def truncated(self):
        return self.lost or any(stream.truncated for stream in self.streams.values())

    def take(self, message):
        """A message of the kernel about this request."""
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == "status":
            self.idle = self.idle or content.get("execution_state") == "idle"
        elif kind == "clear_output":
            self.clearing = True
            if not content.get("wait"):
                self.clear()
        elif kind == "stream" and content.get("name") in self.streams:
            self.clear()
            self.streams[content["name"]].add(str(content.get("text", "")))
        elif kind in ("execute_result", "display_data"):
            self.clear()
            self.show(content)
        elif kind == "update_display_data":
            self.replace(content)
        elif kind == "error":
            self.error = content

    def clear(self):
        """What `clear_output` asked for; with `wait` it happens when something else comes."""
        if self.clearing:
            self.clearing = False
            self.bundles, self.places, self.bytes, self.lost = [], {}, 0, False
            for stream in self.streams.values():
                stream.clear()

    def show(self, content):
        bundle = self.fitting(content)
        if bundle is None:
            return
        if display := content.get("transient", {}).get("display_id"):
            self.places.setdefault(display, []).append(len(self.bundles))
        self.bundles.append(bundle)
        self.bytes += weight(bundle)

    def replace(self, content):
        """A display that was shown before, perhaps several times, shows something else."""
        for place in self.places.get(content.get("transient", {}).get("display_id"), []):
            before = weight(self.bundles[place])
            self.bytes -= before
            bundle = self.fitting(content, len(self.bundles) - 1)
            if bundle is not None:
                self.bundles[place] = bundle
            self.bytes += weight(self.bundles[place])

    def fitting(self, content, others=None):
        """The bundle with as many of its representations as there is room for, small ones first."""
        if (len(self.bundles) if others is None else others) >= RESULTS:
            self.lost = True
            return None
        given, kept, room = texts(content.get("data", {})), {}, RESULT_BYTES - self.bytes
        for kind in sorted(given, key=lambda kind: len(given[kind])):
            size = weight({kind: given[kind]})
            if size <= room:
                kept[kind] = given[kind]
                room -= size
            else:
                self.lost = True
        return {kind: kept[kind] for kind in given if kind in kept} or None


def weight(bundle):
    return len(json.dumps(bundle, ensure_ascii=False).encode("utf-8", "replace"))


def texts(data):
    """Representations with strings as values: what is JSON becomes a JSON text."""
    bundle = {}
    for kind, value in data.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        bundle[kind] = text.encode("utf-8", "replace").decode()
    return bundle


def ending(content):
    """Exit code and error text of an `execute_reply`."""
    if content.get("status") == "ok":
        # Kernels of languages whose cells end with a status tell it.
        return content.get("exit_status", 0), None
    name, value = str(content.get("ename", "")), str(content.get("evalue", ""))
    if name == "SystemExit":
        if value in ("", "None"):
            return 0, None
        if re.fullmatch(r"-?\d{1,18}", value):
            code = int(value) & 0xFF
            return code, f"SystemExit: {value}" if code else None
        return 1, shortened(plain(value), ERROR_BYTES)
    trace = plain("\n".join(str(line) for line in content.get("traceback") or ()))
    if not trace.strip():
        trace = f"{name}: {value}".strip(": ") or "the cell was aborted"
    return 1, shortened(trace, ERROR_BYTES)
