"""Compare the scores of several question sets, and print them as a table."""

from . import bootstrap


def compare(asked, paths, ours, theirs, rate, compared, resamples):
    """{"sets": {name: scores}, "difference": {metric: interval}} over all question sets and draws.

    Args:
        asked, paths: {set name: questions}, and their files.
        ours, theirs: {set name: [answers of each draw]}; theirs may be None.
        rate: function from (questions, answers) to (Graded, {metric: score}).
        compared: {name of a metric: its name in `bootstrap.paired`} of the metrics that get an interval.
    """
    sets, pairs = {}, ([], [])
    for (name, questions), path in zip(asked.items(), paths, strict=True):
        graded, rated = zip(*(rate(questions, answers) for answers in ours[name]), strict=True)
        sets[name] = {"questions": str(path), **mean_of(rated)}
        if theirs:
            others, against = zip(*(rate(questions, answers) for answers in theirs[name]), strict=True)
            sets[name] |= {"against": mean_of(against), "difference": differences(graded, others, compared, resamples)}
            pairs[0].extend(graded)
            pairs[1].extend(others)
    return {"sets": sets} | ({"difference": differences(*pairs, compared, resamples)} if theirs and sets else {})


def mean_of(draws):
    """{"draws": [score of each draw], "mean": their mean}."""
    numbers = [name for name, value in draws[0].items() if not isinstance(value, dict)]
    return {"draws": list(draws), "mean": {name: sum(draw[name] for draw in draws) / len(draws) for name in numbers}}


def differences(ours, theirs, compared, resamples):
    return {
        name: bootstrap.paired(ours, theirs, metric, resamples=resamples).as_dict() for name, metric in compared.items()
    }


def table(report, columns, counts=()):
    """The report as text: one row per question set and system, in percent; differences in points with 95 % intervals.

    Args:
        report: as `compare` returns it.
        columns: names of the metrics.
        counts: names of further columns, which count answers.
    """

    def score_row(label, one):
        numbers = [f"{100 * one[key]:.2f}" for key in columns]
        return [label, f"{one['questions']:.0f}", *numbers, *(f"{round(one[key], 1):g}" for key in counts)]

    def difference_row(label, found):
        intervals = [str(bootstrap.Interval(**found[key])) if key in found else "" for key in columns]
        return [label, "", *intervals, *("" for _ in counts)]

    rows = []
    for name, found in report["sets"].items():
        rows.append(score_row(name, found["mean"]))
        if len(found["draws"]) == 1:
            rows += [score_row(f"    {label}", one) for label, one in found["draws"][0].get("classes", {}).items()]
        for other, difference in (("unshifted", "shift"), ("against", "difference")):
            if other in found:
                rows.append(score_row(f"  {other}", found[other]["mean"]))
            if difference in found:
                rows.append(difference_row(f"  {difference}", found[difference]))
    if "difference" in report and len(report["sets"]) > 1:
        rows.append(difference_row("all, difference", report["difference"]))
    return layout(["questions", "number", *columns, *counts], rows)


def layout(head, rows):
    """Columns of text: the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (head, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
