"""`doctor`, from a shell."""

from __future__ import annotations

import dataclasses
import json

from jaxspec.cli import exits


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Report this machine's devices, speeds, caches and packages, with advice.

    Exit code 1 when something keeps jaxspec from working.

    Examples:
      jaxspec doctor
    """

    json: bool = False
    """Print one JSON object per finding on standard output."""

    def run(self) -> int:
        from jaxspec.doctor import examine

        code = exits.DONE
        for finding in examine():
            if finding.fault:
                code = exits.FAULT
            print(json.dumps(dataclasses.asdict(finding)) if self.json else _line(finding))
        return code


def _line(finding) -> str:
    advice = f"\n{'':20}-> {finding.advice}" if finding.advice else ""
    mark = "!" if finding.fault else " "
    return f"{mark} {finding.subject:<18}{finding.found}{advice}"
