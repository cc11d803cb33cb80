"""curves.png: metrics.csv as a picture."""

import csv
import os


def draw_curves(folder, metrics):
    """`curves.png` from `metrics.csv`: a panel for each title in `metrics` that has values, over
    the first column; a row of `metrics`: (column, what it is) or (column, what it is, title,
    label)."""
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
    drawn = [row for row in metrics if len(row) == 4 and any(line[row[0]] for line in rows)]
    panels = [(title, {label: column for column, _, its, label in drawn if its == title})
              for title in dict.fromkeys(title for *_, title, _ in drawn)]
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 3 * height), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels):
        for label, column in lines.items():
            points = [(float(row[step]), float(row[column])) for row in rows if row[column]]
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
