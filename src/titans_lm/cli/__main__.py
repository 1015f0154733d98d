"""`python -m titans_lm.cli`: as `titans`."""

from titans_lm.cli import main

raise SystemExit(main())
