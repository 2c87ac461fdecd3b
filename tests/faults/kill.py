"""Kill the real workflow again and again at random moments, and compare what it ends with to an undisturbed run.

Every kill is SIGKILL to the whole process group, and the same command starts the workflow again. When it finishes, its
results are compared bit by bit with those of a run that nothing disturbed, and the next round begins in an empty folder.
The harness may be stopped itself: started with the same --work it goes on from the kills it has recorded.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from tqdm import tqdm

from .project import IGNORED, IGNORED_COLUMNS, Project, artefacts, differences, half_made, kill, leftovers

EXAMPLE = "python -m tests.faults.kill --kills 30 --seed 0 --work /tmp/kills --report kills"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.kill",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=30, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--earliest", type=float, default=1.0, help="seconds after the start (default: %(default)s)")
    parser.add_argument("--latest", type=float, default=14.0, help="seconds after the start (default: %(default)s)")
    parser.add_argument(
        "--aimed",
        action="store_true",
        help="kill every stage in turn, at a random moment of the time it takes undisturbed (--kills: how many, from the "
        "first stage on; 0 is all)",
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/mcsmoe-kills"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--report", type=Path, help="written: this name with .parquet and .md (default: kills in the work folder)"
    )
    return parser.parse_args()


class Harness:
    """Rounds of kills in ``work``, each recorded as it happens."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.records = _lines(self.work / "kills.jsonl")
        self.rounds = _lines(self.work / "rounds.jsonl")
        self.process: subprocess.Popen[str] | None = None

    def stop(self, *_: Any) -> None:
        """End what runs, and the harness."""
        if self.process is not None:
            kill(self.process)
        sys.exit("stopped; start it again with the same --work to go on")

    # -- the workflow --------------------------------------------------------------------------------------------
    def session(self, project: Project, seconds: float | None, stage: str | None = None) -> dict[str, Any]:
        """One start of the workflow, killed after ``seconds``; what was running then, and what had finished.

        With ``stage`` the seconds begin when that stage is seen running.
        """
        log = project.place / f"session-{len(list(project.place.glob('session-*'))):03d}.txt"
        started = time.monotonic()
        with log.open("w") as output:
            self.process = project.start(output=output)
        running: list[str] = []
        deadline = started + (900 if seconds is None else seconds)
        while stage is not None and self.process.poll() is None and stage not in _stages(self.process.pid):
            time.sleep(0.02)
            deadline = time.monotonic() + (seconds or 0.0)
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        killed = self.process.poll() is None
        if killed:
            running = _stages(self.process.pid)
            kill(self.process)
        text = log.read_text()
        return {
            "killed": killed,
            "seconds": time.monotonic() - started,
            "running": running or (["(snakemake alone)"] if killed else []),
            "finished": re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", text),
            "survivors": _alive_in_session(self.process.pid),
            "status": None if killed else self.process.returncode,
            "text": text,
        }

    def reference(self) -> Project:
        """An undisturbed run."""
        project = Project(self.work / "reference", alone=True)
        if not (self.work / "reference" / "done.json").is_file():
            shutil.rmtree(project.results, ignore_errors=True)
            found = self.session(project, None)
            if found["status"] != 0:
                raise SystemExit(f"the undisturbed run failed:\n{found['text'][-4000:]}")
            (project.place / "done.json").write_text(json.dumps(found["finished"]))
        return project

    def run(self) -> None:
        """All kills, then the run that finishes."""
        reference = self.reference()
        stages = self.stages(reference)
        if self.arguments.aimed and not self.arguments.kills:
            self.arguments.kills = len(stages)
        bar = tqdm(total=self.arguments.kills, initial=len(self.records), desc="kills", unit="kill", mininterval=0)
        while True:
            enough = len(self.records) >= self.arguments.kills
            if enough and self.rounds and len(self.rounds) > max(one["round"] for one in self.records):
                break
            aim = list(stages)[len(self.records) % len(stages)] if self.arguments.aimed and not enough else None
            self.one(reference, enough, aim, stages.get(aim or "", 0.0))
            bar.update(len(self.records) - bar.n)
            bar.set_postfix_str(f"round {len(self.rounds)}")
        bar.close()

    @staticmethod
    def stages(reference: Project) -> dict[str, float]:
        """Seconds that each stage took undisturbed, in the order they finished."""
        order = dict.fromkeys(json.loads((reference.place / "done.json").read_text()))
        files = {rule: sorted((reference.results / "benchmarks" / rule).rglob("*.tsv")) for rule in order}
        return {rule: float(pd.read_csv(found[0], sep="\t")["s"].iloc[-1]) for rule, found in files.items() if found}

    def one(self, reference: Project, enough: bool, aim: str | None, takes: float) -> None:
        """One start: killed at a random moment (of stage ``aim``, which takes so many seconds), or run to the end."""
        number = len(self.records)
        project = Project(self.work / f"round-{len(self.rounds)}", alone=True)
        draw = np.random.default_rng((self.arguments.seed, number))
        moment = (
            draw.uniform(0.0, min(takes, self.arguments.latest))
            if aim
            else draw.uniform(self.arguments.earliest, self.arguments.latest)
        )
        found = self.session(project, None if enough else float(moment), aim)
        if found["killed"]:
            record = {key: found[key] for key in ("seconds", "running", "finished", "survivors")}
            record |= {"kill": number, "round": len(self.rounds), "aim": aim or ""}
            record["artefacts"] = len(list(artefacts(project.results)))
            record["half_made"] = half_made(project.results)
            _add(self.work / "kills.jsonl", self.records, record)
            return
        if found["status"] != 0:
            raise SystemExit(f"round {len(self.rounds)} did not go on after a kill:\n{found['text'][-4000:]}")
        if aim:  # it was over before the kill; the stages after it are next
            _add(self.work / "kills.jsonl", self.records, _missed(number, len(self.rounds), aim))
        mine = [one for one in self.records if one["round"] == len(self.rounds)]
        jobs = collections.Counter(found["finished"] + [rule for one in mine for rule in one["finished"]])
        expected = collections.Counter(json.loads((reference.place / "done.json").read_text()))
        logs = [path.read_text() for path in project.results.glob("logs/**/*.log")]
        outcome = {
            "round": len(self.rounds),
            "kills": len(mine),
            "differences": differences(reference.results, project.results),
            "again": {rule: count - expected[rule] for rule, count in jobs.items() if count > expected[rule]},
            "resumed": sum("resuming after step" in text for text in logs),
            "leftovers": [path.name for path in leftovers(project.results)],
        }
        _add(self.work / "rounds.jsonl", self.rounds, outcome)
        if not outcome["differences"]:
            shutil.rmtree(project.results)


def _missed(number: int, round_: int, aim: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"running": [], "finished": [], "half_made": []}
    return {"kill": number, "round": round_, "aim": aim, "seconds": 0.0, "survivors": 0, "artefacts": 0, **nothing}


# -- records -----------------------------------------------------------------------------------------------------
def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _add(file: Path, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    records.append(record)
    with file.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def _stages(leader: int) -> list[str]:
    """Stages whose scripts run below ``leader``."""
    found = set()
    for process in psutil.Process(leader).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        found |= {Path(word).stem for word in words if word.endswith(".py") and "workflow_scripts" in word}
    return sorted(found)


def _alive_in_session(leader: int, grace: float = 5.0) -> int:
    """Processes of a session that go on although they were killed; giving their memory back may take a moment."""
    until = time.monotonic() + grace
    while True:
        alive = 0
        for process in psutil.process_iter():
            try:
                alive += os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
            except (psutil.Error, OSError):
                continue
        if not alive or time.monotonic() > until:
            return alive
        time.sleep(0.05)


def frame(harness: Harness) -> pd.DataFrame:
    """One row per kill."""
    rounds = {one["round"]: one for one in harness.rounds}
    rows = []
    for one in harness.records:
        end = rounds.get(one["round"], {"differences": ["not finished"]})
        rows.append(
            {
                **{key: one[key] for key in ("kill", "round", "seconds", "artefacts", "survivors")},
                "running": ", ".join(one["running"]) or f"(missed {one.get('aim')})",
                "half_made": len(one["half_made"]),
                "outcome": "same bits" if not end["differences"] else "; ".join(end["differences"]),
            }
        )
    return pd.DataFrame(rows)


def markdown(harness: Harness, table: pd.DataFrame) -> str:
    """The report as text."""
    stages = collections.Counter(rule for one in harness.records for rule in one["running"])
    lines = [
        f"# {len(table)} kills, seed {harness.arguments.seed}",
        "",
        f"Rounds: {len(harness.rounds)}; same bits as the undisturbed run at the end of "
        f"{sum(not one['differences'] for one in harness.rounds)}. Half-made artefacts under a final name after a kill: "
        f"{int(table['half_made'].sum())}. Processes that outlived a kill: {int(table['survivors'].sum())}.",
        "",
        "| kill | round | after s | running | artefacts then | half-made | outcome of the round |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        lines.append(
            f"| {row.kill} | {row.round} | {row.seconds:.1f} | {row.running} | {row.artefacts} | {row.half_made} "
            f"| {row.outcome} |"
        )
    lines += [
        "",
        "| round | kills | jobs done again | trainings resumed | leftovers | differences |",
        "|---|" * 1 + "---|" * 5,
    ]
    for one in harness.rounds:
        again = ", ".join(f"{rule} {count}" for rule, count in sorted(one["again"].items())) or "none"
        lines.append(
            f"| {one['round']} | {one['kills']} | {again} | {one['resumed']} | {len(one['leftovers'])} "
            f"| {'; '.join(one['differences']) or 'none'} |"
        )
    lines += [
        "",
        "Kills by running stage: " + ", ".join(f"{rule} {count}" for rule, count in stages.most_common()) + ".",
    ]
    lines += ["", "Not compared:", ""]
    lines += [f"- `{name}`: {why}" for name, why in IGNORED.items()]
    lines += [f"- column `{name}`: {why}" for name, why in IGNORED_COLUMNS.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parse()
    harness = Harness(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, harness.stop)
    harness.run()
    table = frame(harness)
    place = arguments.report or arguments.work / "kills"
    table.to_parquet(place.with_suffix(".parquet"), index=False)
    place.with_suffix(".md").write_text(markdown(harness, table))
    print(f"report: {place.with_suffix('.md')}")
    failed = any(one["differences"] for one in harness.rounds) or table["half_made"].any() or table["survivors"].any()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
