"""Writes records to a store and says on standard output which are acknowledged; killed again and again by test_store."""

from __future__ import annotations

import sys

from calibration.records.store import Header, Store


def main() -> None:
    """Arguments: the file, and how many records it shall hold in the end."""
    path, total = sys.argv[1], int(sys.argv[2])
    with Store(path, Header("planted device", {"driver": "1"})) as store:
        present = {row["key"] for row in store.rows}
        print("open", flush=True)
        for number in range(total):
            if f"shape {number}" not in present:
                store.append(
                    {"key": f"shape {number}", "purpose": "fit", "median_s": 1e-6, "samples_s": [1e-6 + number] * 40}
                )
                print(number, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
