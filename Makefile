# Every target sets up what it needs first; scripts/bootstrap.py skips what is already there.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
ifdef COMFYUI_DIR  # a user's own checkout: nothing is written into it, no bytecode either
export PYTHONDONTWRITEBYTECODE := 1
else  # hundreds of processes import ComfyUI, which takes a second more where each compiles it
export PYTHONDONTWRITEBYTECODE :=
endif

UNDISTURBED := tests/multirank tests/unit
FILES_AT_ONCE ?= 2
PROFILES := $(patsubst %,build/simulate/%.json,sd15 sd21 sdxl)
HAS_GPU = $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"

.PHONY: demo test test-gpu lint bench bench-all quality quality-all families faults soak fuzz setup clean distclean
.DEFAULT_GOAL := demo

demo: setup  ## one prompt through ComfyUI alone and through both nodes: a table and a picture
	@$(BIN)/python scripts/demo.py

test: lint  ## lint, then every test that can run here; those that nothing disturbs several files at a time
	$(BIN)/pytest -n $(FILES_AT_ONCE) --dist loadfile $(UNDISTURBED)
	$(BIN)/pytest $(addprefix --ignore ,$(UNDISTURBED))
	! $(HAS_GPU) || $(MAKE) test-gpu

test-gpu: setup  ## what ranks do, with ranks on GPUs; memory first, with nobody else on them
	TEST_ON_GPUS=1 $(BIN)/pytest tests/gpu
	TEST_ON_GPUS=1 $(BIN)/pytest -n $(FILES_AT_ONCE) --dist loadfile tests/multirank tests/faults tests/host/test_server_blocks.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/codespell
	PYTHONPATH=build/lint $(BIN)/lint-imports --no-logo
	$(BIN)/basedpyright

bench: setup  ## speed on a denoiser heavy enough to tell
	@$(BIN)/python scripts/bench.py

bench-all: setup  ## the measured tables of speed in docs/results.md, and the simulated ones: some three hours of a machine left alone
	@$(BIN)/python scripts/bench.py
	@$(BIN)/python scripts/bench.py --model sd21 --repeat 1
	@$(BIN)/python scripts/bench.py --only "2 lanes" --steps 50 --repeat 1
	@$(BIN)/python scripts/bench.py --scaling --steps 8
	@$(BIN)/python scripts/bench.py --ranks 3 --repeat 1
	@$(BIN)/python scripts/bench.py --ranks 4 --repeat 1
	@$(BIN)/python scripts/bench.py --batch --size 32 --steps 10 --warmup 1 --repeat 1
	@$(BIN)/python scripts/validate.py
	@$(BIN)/python scripts/emulate.py
	@$(BIN)/python scripts/simulate.py --profile sd15 sd21 sdxl --device cpu
	@$(BIN)/python scripts/simulate.py $(PROFILES)
	@$(BIN)/python scripts/simulate.py $(PROFILES) --by-link --devices 2 4
	@$(BIN)/python scripts/simulate.py docs/profiles/*.json --devices 2 4 --links 12 50 300

WITHOUT_CFG := --models flux,unet,wan --cfg 1
BY_DPM := --sampler dpmpp_2m --samples 8 --steps 20,50
define without_cfg
	@$(BIN)/python scripts/quality.py $(WITHOUT_CFG) $(1) --only "lookahead|as published|balanced$$|faithful$$|fast$$|EasyCache"
endef
quality-all: setup  ## every table of docs/quality: some eleven hours of two cores
	@$(BIN)/python scripts/quality.py
	@$(BIN)/python scripts/quality.py --models flux,unet,wan --sampler dpmpp_2m --samples 8 --steps 20,30,50
	$(call without_cfg,)
	$(call without_cfg,$(BY_DPM))

quality: setup  ## how close both nodes come to ComfyUI alone, on the trained models, in short, 41 minutes on two cores: build/quality
	@$(BIN)/python scripts/quality.py --samples 4 --out build/quality

families: setup  ## every architecture, U-Nets at full size: docs/families.md
	LEAPFROG_WRITE_DOCS=1 LEAPFROG_FULL_SIZE=1 $(BIN)/pytest tests/multirank/test_families.py tests/full_size

fuzz: setup  ## a million malformed frames at every listener and parser
	@$(BIN)/python scripts/fuzz.py

faults: setup  ## 200 things broken under a queue of prompts: docs/results.md
	@$(BIN)/python scripts/faults.py

soak: setup  ## 500 prompts and what is held after them: docs/results.md
	@$(BIN)/python scripts/soak.py

setup:
	@$(PYTHON) scripts/bootstrap.py

clean:  ## what the set-up can make again in seconds
	rm -rf build .pytest_cache .ruff_cache .import_linter_cache .hypothesis

distclean: clean  ## also the environment and ComfyUI
	rm -rf .venv .comfyui
