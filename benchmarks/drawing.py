"""Draw curves of several runs as an SVG file for docs/, with colours for light and dark pages."""

from collections.abc import Sequence

from trainer.report.svg import Chart, Curve, Shape, draw

COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0a7ea4")
LEFT, TOP, WIDTH, HEIGHT, ROW = 60, 34, 470, 290, 20
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.pale{fill:#59636e}.grid{stroke:#d1d9e0}path{fill:none;"
    "stroke-width:1.8;vector-effect:non-scaling-stroke}.n{stroke:#1f2328;stroke-dasharray:5 3}"
    "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.pale{fill:#9198a1}.grid{stroke:#3d444d}.n{stroke:#f0f6fc}}"
)


def svg(title: str, unit: str, curves: Sequence[Curve], top: float | None = None) -> str:
    """Draw one figure. A curve without a colour is dashed. `top` is the end of the y axis (default: the maximum)."""
    chart = draw(curves, y_range=(None, top))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {TOP + HEIGHT + 30}" role="img">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="18">{title}</text><text class="pale" x="{LEFT + WIDTH}" y="18" '
        f'text-anchor="end">{unit}</text>',
        *_axes(chart),
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 1000 1000" '
        'preserveAspectRatio="none">',
        *(f'<path {_stroke(shape)} d="{shape.path}"/>' for shape in chart.shapes),
        "</svg>",
        *(_legend_entry(row, shape) for row, shape in enumerate(chart.shapes)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _axes(chart: Chart) -> list[str]:
    elements = []
    for tick in chart.y_ticks:
        y = TOP + HEIGHT * (1 - tick.at / 100)
        elements.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{WIDTH}"/>')
        elements.append(f'<text class="pale" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick.text}</text>')
    for tick in chart.x_ticks:
        x = LEFT + WIDTH * tick.at / 100
        y = TOP + HEIGHT + 20
        elements.append(f'<text class="pale" x="{x:.1f}" y="{y}" text-anchor="middle">{tick.text}</text>')
    return elements


def _stroke(shape: Shape) -> str:
    return 'class="n"' if shape.colour is None else f'stroke="{COLOURS[shape.colour % len(COLOURS)]}"'


def _legend_entry(row: int, shape: Shape) -> str:
    x, y = LEFT + WIDTH + 20, TOP + 10 + row * ROW
    line = f'<path {_stroke(shape)} d="M{x} {y - 4}h22"/>'
    return f'{line}<text x="{x + 30}" y="{y}">{shape.name} <tspan class="pale">{shape.last}</tspan></text>'
