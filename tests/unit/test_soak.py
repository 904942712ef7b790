"""What the soak calls growth."""

from __future__ import annotations

from benchmarks.soak import Look, grown


def looks(*rss_mib: float, files: int = 20, last_files: int = 20) -> list[Look]:
    return [
        Look(10.0 * at, "gateway", each, last_files if at >= 30 else files, 30)
        for at, each in enumerate(each for each in rss_mib for _ in range(10))
    ]


def test_memory_that_settles_is_no_growth() -> None:
    assert grown(looks(150, 280, 285, 290), "gateway") == []


def test_memory_that_climbs_is_told_with_its_numbers() -> None:
    assert grown(looks(150, 280, 320, 380), "gateway") == ["gateway: memory from 280 to 380 MiB"]


def test_files_that_stay_open_are_told() -> None:
    found = grown(looks(150, 280, 280, 280, files=20, last_files=60), "gateway")
    assert found == ["gateway: open files from 20 to 60"]
