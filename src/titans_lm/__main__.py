"""`python -m titans_lm`: as `titans`, also under torchrun and accelerate launch."""

from titans_lm.cli import main

raise SystemExit(main())
