"""check_skips.py REPORT...: fails where a test was skipped for a reason that allowed_skips.txt does not hold.

Each line of that file is a regular expression for a whole reason. With --sum it prints what all reports count.
"""

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

lines = Path(__file__).with_name("allowed_skips.txt").read_text().splitlines()
allowed = [line for line in lines if line and not line.startswith("#")]
count, wrong = Counter(), []
for report in [argument for argument in sys.argv[1:] if argument != "--sum"]:
    for case in ET.parse(report).iter("testcase"):
        result = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        count["passed" if result is None else "skipped" if result.tag == "skipped" else "failed"] += 1
        if result is not None and result.tag == "skipped":
            reason = result.get("message", "")
            if not any(re.fullmatch(pattern, reason) for pattern in allowed):
                wrong.append(f"{case.get('classname')}::{case.get('name')}: skipped, which is not allowed: {reason}")
print("\n".join(wrong), end="\n" if wrong else "")
if "--sum" in sys.argv:
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
sys.exit(bool(wrong))
