"""Stores each committed run once, with thin curves: run once, then removed.

    python -m lib.convert

A run that several experiments of a profile share stays in the file of the first of them in the
order of lib/experiments.py that has its measures, and is taken out of the others.
"""

from __future__ import annotations

import pandas as pd

from lib import experiments, paths
from lib.results import store


def main() -> None:
    """Convert every profile in place."""
    for profile in experiments.PROFILES:
        folder = paths.results_dir(profile)
        files = {path.stem: path for path in store.run_paths(folder)}
        names = [name for name in experiments.EXPERIMENTS if name in files]
        assert set(names) == set(files), set(files) - set(names)
        tables = {}
        measured: dict[str, str] = {}
        for name in names:
            runs = store.read_runs(files[name])
            beside = [store.read_measures(files[name], runs), store.read_layers(files[name], runs)]
            tables[name] = runs, [*beside, store.read_curves(files[name], runs)]
            for run_id in beside[0]["run_id"].unique():
                measured.setdefault(run_id, name)
        kept: set[str] = set()
        copies: dict[str, pd.Series] = {}
        for name in names:
            runs, beside = tables[name]
            for _, row in runs.iterrows():
                mine = row.drop(["experiment", *store.PROVENANCE - {"threads", "kernels"}])
                other = copies.setdefault(row["run_id"], mine)
                assert mine.equals(other), (name, row["run_id"], mine.compare(other))
            here = [i not in kept and measured.get(i, name) == name for i in runs["run_id"]]
            kept |= set(runs["run_id"][here])
            rows = runs[here]
            new = {}
            for (end, columns), table in zip(store.BESIDE.items(), beside, strict=True):
                table = table[table["run_id"].isin(rows["run_id"])]
                new[end] = store._lines(files[name], columns, table)
                files[name].with_suffix(end).unlink(missing_ok=True)
            files[name].unlink()
            if len(rows):
                store._append(files[name], new, store._lines(files[name], store.COLUMNS, rows))
                runs_now = store.read_runs(files[name])
                pd.testing.assert_frame_equal(runs_now, rows.reset_index(drop=True))
            files[name].with_name(f".{files[name].name}.lock").unlink(missing_ok=True)
        assert kept == set(copies)
        print(profile, len(copies), "runs")


if __name__ == "__main__":
    main()
