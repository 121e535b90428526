# Every target works from nothing but python3 (3.11 or newer) and a package index.
.PHONY: demo serve test lint bench clean

demo:  ## a server, and a fine-tuning on it; ARGS=--exit ends with the demo
	@scripts/setup demo
	@scripts/demo $(ARGS)

serve:  ## the server alone; ARGS go to `tinkercloud serve`
	@scripts/setup
	@exec .venv/bin/tinkercloud serve $(ARGS)

test:  ## all tests; ARGS go to pytest
	@scripts/setup dev
	@scripts/test $(ARGS)

lint:  ## style, format, types
	@scripts/setup dev
	@scripts/lint

bench:  ## measurements; ARGS go to scripts/bench
	@scripts/setup dev
	@scripts/bench $(ARGS)

clean:  ## everything made here except data/
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
