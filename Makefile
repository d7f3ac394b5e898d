.PHONY: check test ci format

check: ## format, lint, types, import contracts
	@.ci/check

test: ## the default tests: CPU, no network
	pytest

ci: ## everything CI does, in fresh environments
	.ci/run

format: ## rewrite what the formatter and the linter can fix
	ruff format .
	ruff check --fix .
