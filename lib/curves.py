"""curves.png: metrics.csv as a picture."""

import csv
import os


def draw_curves(folder, panels):
    """`curves.png` from `metrics.csv`: a panel for each `(title, {label: column})` that has values,
    over the first column."""
    try:
        import matplotlib
    except ImportError:
        print("no curves.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(os.path.join(folder, "metrics.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    step = next(iter(rows[0]))
    panels = [(title, lines) for title, lines in panels
              if any(row[column] for row in rows for column in lines.values())]
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 3 * height), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels):
        for label, column in lines.items():
            points = [(float(row[step]), float(row[column])) for row in rows if row[column]]
            if points:
                axis.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel=step)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels):]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(os.path.join(folder, "curves.png"), dpi=110)
    plt.close(figure)
