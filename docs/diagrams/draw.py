"""Draws the diagrams of `docs/concepts.md`: `python docs/diagrams/draw.py` writes an SVG file for each beside this one.

The script always writes the same bytes, and `tests/test_docs.py` compares them with the files. To change a diagram,
edit this script and run it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH = 520
"""Of every diagram: on a phone, 360 pixels wide, its text stays legible."""
FILLS = {
    "plain": ("#f1f3f5", "#868e96"),
    "attention": ("#dbe9ff", "#2f6fd0"),
    "memory": ("#ffe3c2", "#c76a00"),
    "persistent": ("#d8f3dc", "#2f8f4e"),
    "gate": ("#f3e3ff", "#8a4fc4"),
}
"""Fill and border of each kind of part: short-term memory, long-term memory, persistent memory, a gate."""
INK, FAINT = "#1b1f24", "#5c636b"


class Box(NamedTuple):
    """A part of a diagram, and the points at which arrows meet it."""

    x: float
    y: float
    width: float
    height: float

    def at(self, side: str, share: float = 0.5) -> tuple[float, float]:
        """The point at `share` of a side ("top", "bottom", "left", "right"), from the left or from the top."""
        if side in ("top", "bottom"):
            return self.x + share * self.width, self.y + (self.height if side == "bottom" else 0)
        return self.x + (self.width if side == "right" else 0), self.y + share * self.height


class Drawing:
    """Collects the elements of one SVG file, `WIDTH` pixels wide."""

    def __init__(self, height: int, title: str):
        self.height, self.title, self.parts = height, title, [""]

    def box(
        self, center: float, y: float, width: float, *lines: str, kind: str = "plain", first_bold: bool = True
    ) -> Box:
        """A rounded box with centred `lines`, the first of them bold. `center` and `y` (its top) in pixels."""
        height = 14 + 20 * len(lines)
        fill, border = FILLS[kind]
        box = Box(center - width / 2, y, width, height)
        self.parts.append(
            f'<rect x="{box.x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{fill}" '
            f'stroke="{border}" stroke-width="1.5"/>'
        )
        for i, line in enumerate(lines):
            self.text(center, y + 22 + 20 * i, line, bold=first_bold and i == 0)
        return box

    def text(
        self, x: float, y: float, words: str, *, bold: bool = False, anchor: str = "middle", faint: bool = False
    ) -> None:
        """One line of text; `x_y` in the words is x with the subscript y, up to the next space or bracket."""
        weight = ' font-weight="600"' if bold else ""
        size = 14 if faint else 16
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{FAINT if faint else INK}"{weight}>{_subscripts(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through the points, with a head at its last."""
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.5" stroke-linejoin="round"{dash} '
            'marker-end="url(#head)"/>'
        )

    def down(self, upper: Box, lower: Box, share: float = 0.5, *, dashed: bool = False) -> None:
        """A straight arrow from the bottom of one box to the top of another; `share` of the narrower's width."""
        narrow = min(upper, lower, key=lambda box: box.width)
        x = narrow.at("top", share)[0]
        self.arrow((x, upper.y + upper.height), (x, lower.y - 1), dashed=dashed)

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" font-family="system-ui, \'DejaVu Sans\', sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="7.5" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{self.height}" rx="10" fill="#ffffff"/>'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def _subscripts(words: str) -> str:
    """`M_t-1(k_t)` with what follows a `_`, up to a space, bracket or comma, set lower and smaller."""
    out, rest = "", words
    while "_" in rest:
        before, _, rest = rest.partition("_")
        length = next((i for i, c in enumerate(rest) if c in " ()[],*‖²"), len(rest))
        out += escape(before)
        out += f'<tspan dy="4" font-size="11">{escape(rest[:length])}</tspan>'
        rest = rest[length:]
        out += '<tspan dy="-4">\u200b</tspan>' if rest else ""
        # the zero-width space takes the line back up for all that follows
    return out + escape(rest)


# ------------------------------------------------------------------------------------------------ the memory


def memory_step() -> Drawing:
    d = Drawing(560, "One step of the memory: loss, surprise, weights, retrieval")
    x = d.box(260, 16, 210, "token x_t")
    k = d.box(70, 92, 104, "key k_t", first_bold=False)
    v = d.box(190, 92, 104, "value v_t", first_bold=False)
    q = d.box(310, 92, 104, "query q_t", first_bold=False)
    g = d.box(440, 92, 136, "gates θ_t η_t α_t", first_bold=False, kind="gate")
    for share, part in ((0.1, k), (0.35, v), (0.65, q), (0.9, g)):
        d.arrow(x.at("bottom", share), (part.at("top")[0], part.y - 1))
    loss = d.box(130, 178, 228, "loss", "‖ M_t-1(k_t) − v_t ‖²", kind="memory")
    d.down(k, loss)
    d.down(v, loss)
    s = d.box(220, 278, 408, "surprise (momentum of gradients)", "S_t = η_t S_t-1 − θ_t ∇ loss", kind="memory")
    d.arrow(loss.at("bottom"), (130, s.y - 1))
    d.text(140, 258, "∇, by the weights of M", anchor="start", faint=True)
    m = d.box(220, 370, 408, "memory (the weights of a small MLP)", "M_t = (1 − α_t) M_t-1 + S_t", kind="memory")
    d.arrow(s.at("bottom"), (220, m.y - 1))
    y = d.box(220, 462, 408, "retrieval", "y_t = M_t(q_t)", kind="plain")
    d.arrow(m.at("bottom"), (220, y.y - 1))
    d.arrow((470, g.y + g.height), (470, 305), (s.at("right")[0] + 2, 305))
    d.arrow((470, 305), (470, 397), (m.at("right")[0] + 2, 397))
    d.arrow((q.at("bottom")[0], q.y + q.height), (310, 232), (500, 232), (500, 489), (y.at("right")[0] + 2, 489))
    d.text(260, 545, "The state is (M, S): its size does not depend on what was read.", faint=True)
    return d


def chunks() -> Drawing:
    d = Drawing(300, "A sequence, its segments and its chunks")
    rows = (("sequence", 1, "plain", "the tokens of one call"),
            ("segments", 2, "attention", "what MAC's attention sees at once"),
            ("chunks", 8, "memory", "tokens whose gradients share their weights"))  # fmt: skip
    for i, (name, parts, kind, what) in enumerate(rows):
        y = 18 + 88 * i
        d.text(20, y + 14, name, bold=True, anchor="start")
        d.text(118, y + 14, what, anchor="start", faint=True)
        fill, border = FILLS[kind]
        width = 480 / parts
        for part in range(parts):
            d.parts.append(
                f'<rect x="{20 + part * width:g}" y="{y + 24}" width="{width:g}" height="30" fill="{fill}" '
                f'stroke="{border}" stroke-width="1.5"/>'
            )
        for token in range(33 if i == 0 else 0):
            d.parts.append(
                f'<line x1="{20 + 15 * token}" y1="{y + 24}" x2="{20 + 15 * token}" y2="{y + 54}" stroke="{border}" '
                'stroke-width="0.7"/>'
            )
    d.text(260, 284, "The memory goes on across all of these borders.", faint=True)
    return d


# ------------------------------------------------------------------------------------------------ the variants

MIDDLE = 260


def _residual(d: Drawing, top: Box, plus: Box) -> None:
    """The way around a branch, on the left."""
    d.arrow((top.x, top.y + top.height / 2), (22, top.y + top.height / 2), (22, plus.y + 17), (plus.x - 1, plus.y + 17))


def _end(d: Drawing, branch: Box, y: float, top: Box) -> None:
    plus = d.box(MIDDLE, y, 60, "+")
    d.down(branch, plus)
    _residual(d, top, plus)
    mlp = d.box(MIDDLE, y + 62, 250, "norm, SwiGLU, +")
    d.down(plus, mlp)


def _begin(d: Drawing, tokens: str = "x", normed: str = "norm") -> tuple[Box, Box]:
    x, norm = d.box(MIDDLE, 16, 250, tokens), d.box(MIDDLE, 78, 250, normed, first_bold=False)
    d.down(x, norm)
    return x, norm


def lmm() -> Drawing:
    d = Drawing(362, "LMM: the memory alone")
    x, norm = _begin(d)
    memory = d.box(MIDDLE, 150, 310, "neural memory", "writes x, reads M_t(x)", kind="memory")
    d.down(norm, memory)
    _end(d, memory, 248, x)
    return d


def mag() -> Drawing:
    d = Drawing(464, "MAG: memory as gate")
    x, norm = _begin(d)
    p = d.box(88, 78, 60, "P", kind="persistent")
    attention = d.box(160, 160, 200, "attention", "sliding window, P", kind="attention")
    memory = d.box(398, 160, 200, "neural memory", "reads P once, first", kind="memory")
    d.arrow(p.at("bottom"), (88, attention.y - 1))
    d.arrow(norm.at("bottom", 0.2), (norm.at("bottom", 0.2)[0], attention.y - 1))
    d.arrow(norm.at("bottom", 0.9), (norm.at("bottom", 0.9)[0], memory.y - 1))
    gate = d.box(MIDDLE, 260, 330, "gate", "norm(y) · sigmoid(norm(m))", kind="gate")
    d.arrow(attention.at("bottom"), (160, gate.y - 1))
    d.arrow(memory.at("bottom"), (398, gate.y - 1))
    d.text(150, 238, "y", anchor="end")
    d.text(410, 238, "m", anchor="start")
    _end(d, gate, 350, x)
    return d


def mal() -> Drawing:
    d = Drawing(508, "MAL: memory as layer")
    x, norm = _begin(d)
    memory = d.box(MIDDLE, 150, 310, "neural memory", "reads P once, first", kind="memory")
    d.down(norm, memory)
    inner = d.box(MIDDLE, 236, 250, "+, norm", first_bold=False)
    d.down(memory, inner)
    d.arrow((x.at("right")[0], 33), (490, 33), (490, inner.y + 17), (inner.at("right")[0] + 2, inner.y + 17))
    p = d.box(78, 236, 72, "M(P)", kind="persistent")
    attention = d.box(MIDDLE, 304, 310, "attention", "sliding window, and M(P)", kind="attention")
    d.down(inner, attention)
    d.arrow(p.at("bottom"), (78, 331), (attention.x - 2, 331))
    d.text(248, 380, "y", anchor="end")
    _end(d, attention, 394, x)
    d.arrow((memory.at("right")[0], 177), (462, 177), (462, 411), (292, 411))
    d.text(456, 356, "m", anchor="end")
    return d


def mac() -> Drawing:
    d = Drawing(770, "MAC: memory as context")
    x, norm = _begin(d, "segment of x", "norm: S")
    h = d.box(380, 150, 224, "retrieve h", "M before the segment", kind="memory")
    d.arrow(norm.at("bottom", 0.85), (norm.at("bottom", 0.85)[0], h.y - 1))
    p = d.box(90, 248, 90, "P", kind="persistent")
    s = d.box(220, 248, 120, "S")
    hh = d.box(380, 248, 150, "h", kind="memory")
    d.arrow(norm.at("bottom", 0.25), (norm.at("bottom", 0.25)[0], s.y - 1))
    d.down(h, hh)
    sees = "full in the segment, causal: token i sees h_j, S_j, j ≤ i"
    attention = d.box(MIDDLE, 330, 430, "attention over [P, h, S]", sees, kind="attention")
    for part in (p, s, hh):
        d.down(part, attention)
    add = d.box(MIDDLE, 424, 250, "+ S, norm", first_bold=False)
    d.down(attention, add)
    d.text(248, 410, "y", anchor="end")
    memory = d.box(MIDDLE, 496, 310, "neural memory", "writes, token t reads M_t", kind="memory")
    d.down(add, memory)
    gate = d.box(MIDDLE, 590, 310, "gate", kind="gate")
    d.down(memory, gate)
    d.text(272, 575, "m", anchor="start")
    d.arrow(
        attention.at("bottom", 0.9),
        (attention.at("bottom", 0.9)[0], 404),
        (490, 404),
        (490, 607),
        (gate.at("right")[0] + 2, 607),
    )
    _end(d, gate, 656, x)
    return d


DIAGRAMS: dict[str, Callable[[], Drawing]] = {
    "memory": memory_step, "chunks": chunks, "mac": mac, "mag": mag, "mal": mal, "lmm": lmm,
}  # fmt: skip
"""By file name, without `.svg`."""


def main() -> None:
    """Write every diagram beside this file."""
    for name, draw in DIAGRAMS.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
