"""The page of a run, finished or not: python show_report.py RUN"""

import sys

from threestage.report.report import write_report

page = write_report(sys.argv[1], images=3)
print(page.uri, page.missing)
