"""The README's configuration table, generated from the descriptions in `common/config.py`.

`python -m common.config_table` prints it; with `--write README.md` it replaces the one between the markers.
"""

import argparse
from pathlib import Path

from common.config import REFERENCE_MODEL, ServingConfig, allowed_values

BEGIN, END = "<!-- configuration table: begin -->", "<!-- configuration table: end -->"


def markdown_table() -> str:
    rows = ["| key | default | allowed | what it does |", "|---|---|---|---|"]
    for key, field in ServingConfig.model_fields.items():
        rows.append(f"| `{key}` | {_default(field.default)} | {allowed_values(key)} | {field.description} |")
    return "\n".join(rows)


def replace_table(text: str) -> str:
    """The text with the table between its markers replaced by today's.

    Raises:
        ValueError: the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the text has no {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


def _default(value: object) -> str:
    if value is None:
        return ""
    if value == str(REFERENCE_MODEL):
        return "`models/reference`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    path = parser.parse_args().write
    if path is None:
        print(markdown_table())
    else:
        path.write_text(replace_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
