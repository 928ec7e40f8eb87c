# The map of the method. Every target prints the commands it runs, and running it again continues
# where it stopped.
#
#   make tiny     the whole pipeline on a toy world of six languages, on a CPU, in minutes;
#                 PLAIN=1: by the seven plain scripts alone, without fast/; SEED=: of the backbone
#   make seeds    that with five backbones, in 30 to 50 minutes -> docs/seeds.md
#   make compare  every adapter that the paper compares on that world, three seeds, on a CPU, in
#                 an hour on 2 cores -> docs/results.md
#   make small    the whole method on a small real model and real text, on one GPU, or smaller on a
#                 CPU (docs/real-text.md has hours) -> runs/small/.../real-text.md; MODEL=, CORPORA=,
#                 SOURCE= as below; PAIRS=, FLORES=, PSEUDO=, TEST= per direction, TRIES= per pseudo
#                 pair, BATCH=; MACHINE= says on the page what it ran on
#   make test     the tests, without fast/ and with it
#   make lint     formatter and linter
#   make paper    the same chain with the paper's values, on two 80 GB GPUs; MODEL=..., CORPORA=...
#                 and SOURCE=... change what it starts from

PYTHON  = .venv/bin/python
MODEL   = meta-llama/Meta-Llama-3-8B-Instruct
CORPORA = corpora
SOURCE  = publisher
RUN     = runs/$(notdir $(MODEL:%/=%))
GPUS    = .venv/bin/torchrun --standalone --nproc_per_node=2
CPUS    = OMP_NUM_THREADS=1 $(GPUS)

ifneq ($(words $(MODEL)) $(words $(CORPORA)),1 1)
$(error MODEL and CORPORA: a name without blanks each; a link gives a folder such a name)
endif

tiny seeds compare test: export CUDA_VISIBLE_DEVICES =  # on a CPU, whatever the machine has
# torch warns of find_unused_parameters where the first batch uses every expert; later ones don't.
tiny seeds compare small paper: export TORCH_CPP_LOG_LEVEL = ERROR

.PHONY: tiny seeds compare small test lint paper world

PYTHON_IS = import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
  "make: needs Python 3.11 to 3.13 (COMET up to 3.12), and python3 is %d.%d; PYTHON3=... names another" % v)
PYTHON3   = python3

.venv/installed: requirements.txt
	@$(PYTHON3) -c '$(PYTHON_IS)'
	$(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

define NEWLINE


endef

# --- the toy world --------------------------------------------------------------------------------

W = runs/tiny$(SEED:%=-seed%)
T = $(W)$(if $(PLAIN),-plain)
ENGINE      = $(if $(PLAIN),--plain)
TINY_TRAIN  = --model $(W)/backbone --data $(T)/data --lr 5e-3 \
              --micro-batch-size 16 $(ENGINE)
TINY_DECODE = --max-new-tokens 48 $(ENGINE)
TINY_SCORE  = --all-directions --test $(T)/data/test.jsonl $(TINY_DECODE)
SYSTEMS     = $(T)/scores/base $(T)/scores/stage1 $(T)/scores/stage2

world: .venv/installed
	$(PYTHON) examples/tiny/world.py --out $(W)/world --dev 50 --test 100
	$(PYTHON) examples/tiny/pretrain.py --world $(W)/world --out $(W)/backbone $(SEED:%=--seed %)

tiny: world
	$(PYTHON) data.py --data $(W)/world --out $(T)/data --languages en,de,is,cs,ru,zh \
	  --train-pairs 600 --dev-pairs 20 --test-pairs 50
	$(CPUS) train.py --stage 1 $(TINY_TRAIN) --out $(T)/stage1
	$(CPUS) pivot.py --adapter $(T)/stage1/adapter --data $(T)/data --out $(T)/pseudo \
	  --pairs 600 $(TINY_DECODE)
	$(CPUS) train.py --stage 2 $(TINY_TRAIN) --pseudo $(T)/pseudo --out $(T)/stage2
	$(CPUS) evaluate.py $(TINY_SCORE) --model $(W)/backbone --out $(T)/scores/base
	$(CPUS) evaluate.py $(TINY_SCORE) --adapter $(T)/stage1/adapter --out $(T)/scores/stage1
	$(CPUS) evaluate.py $(TINY_SCORE) --adapter $(T)/stage2/adapter --out $(T)/scores/stage2
	$(PYTHON) support/report.py $(SYSTEMS)
	@echo "adapters:      $(T)/stage1/adapter $(T)/stage2/adapter"
	@echo "pseudo-corpus: $(T)/pseudo/report.md"
	@echo "translations:  $(T)/scores/*/hypotheses.jsonl, scores per direction in table.md"

SEEDS = 2 3 4 5

ifneq ($(filter seeds,$(MAKECMDGOALS)),)
ifneq ($(PLAIN)$(SEED),)
$(error make seeds: without PLAIN and SEED)
endif
endif

# The first is make tiny's own. A line each: one after another, whatever -j says.
seeds: tiny
	$(foreach seed,$(SEEDS),$(MAKE) tiny SEED=$(seed)$(NEWLINE)	)
	$(PYTHON) examples/tiny/seeds.py --runs $(W) $(SEEDS:%=runs/tiny-seed%) --page docs/seeds.md \
	  --data-out docs/data/seeds.json

compare: world
	$(PYTHON) examples/tiny/compare.py --world $(W)/world --backbone $(W)/backbone \
	  --out runs/compare --results docs/results.md --data-out docs/data/compare.json

# --- a small real model ---------------------------------------------------------------------------

small: MODEL = HuggingFaceTB/SmolLM2-135M-Instruct
S       = runs/small/$(notdir $(MODEL:%/=%))
PAIRS   = 1000
FLORES  = 50
PSEUDO  = 300
TRIES   = 3
TEST    = 100
BATCH   = 32
MACHINE = a machine of unknown kind
S_TRAIN = --model $(MODEL) --data $(S)/data --epochs 1 --batch-size $(BATCH) --save-every 20
S_TEST  = --test $(S)/data/test.jsonl
S_SCORE = --all-directions $(S_TEST) --max-new-tokens 256
TRAINED = stage1 stage2 lora molora-static

small: .venv/installed
	$(PYTHON) data.py --source $(SOURCE) --data $(CORPORA) --out $(S)/data \
	  --train-pairs $(PAIRS) --flores-pairs $(FLORES) --dev-pairs 10 --test-pairs $(TEST) \
	  --flores-test
	$(PYTHON) train.py --stage 1 $(S_TRAIN) --out $(S)/stage1
	$(PYTHON) pivot.py --adapter $(S)/stage1/adapter --data $(S)/data --out $(S)/pseudo \
	  --pairs $(PSEUDO) --max-tries $(TRIES) --max-new-tokens 256
	$(PYTHON) train.py --stage 2 $(S_TRAIN) --pseudo $(S)/pseudo --out $(S)/stage2
	$(PYTHON) train.py --stage 2 $(S_TRAIN) --pseudo $(S)/pseudo --out $(S)/lora \
	  --adapter-type lora
	$(PYTHON) train.py --stage 2 $(S_TRAIN) --pseudo $(S)/pseudo --out $(S)/molora-static \
	  --adapter-type molora-static
	$(PYTHON) evaluate.py $(S_SCORE) --model $(MODEL) --out $(S)/scores/base
	$(PYTHON) support/likelihood.py $(S_TEST) --model $(MODEL) --out $(S)/scores/base
	$(foreach s,$(TRAINED),$(PYTHON) evaluate.py $(S_SCORE) --adapter $(S)/$(s)/adapter \
	  --out $(S)/scores/$(s)$(NEWLINE)	$(PYTHON) support/likelihood.py $(S_TEST) \
	  --adapter $(S)/$(s)/adapter --out $(S)/scores/$(s)$(NEWLINE)	)
	$(PYTHON) support/report.py $(S)/scores/base $(TRAINED:%=$(S)/scores/%)
	$(PYTHON) examples/real_text.py --run $(S) --page $(S)/real-text.md \
	  --data-out $(S)/real-text.json --machine "$(MACHINE)"

# --- the tests ------------------------------------------------------------------------------------

PYTEST = -m pytest -q -n 2 --dist worksteal

# First without fast/, in a copy of the checkout: the seven plain scripts stand alone. Then with it,
# all that it can change. The long chain of defaults is run with it, as users have it, and what is
# marked `once` without it: both passes together must end within twenty minutes.
test: .venv/installed
	rm -rf .plain
	mkdir .plain
	cp -r $(filter-out fast runs data corpora,$(wildcard *)) .plain
	cd .plain && ../$(PYTHON) $(PYTEST) -k "not defaults_chain"
	rm -rf .plain
	$(PYTHON) $(PYTEST) -k "not plain]" -m "not once"

lint: .venv/installed
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check

# --- the paper's run ------------------------------------------------------------------------------

# 512 sentences decoded together (default 128): with fast/ about 2**18 slots of cache at most, 32 GiB
# for Llama-3-8B beside the backbone's 15; without it lower the number.
ROWS  = --batch-size 512
SCORE = --all-directions --test $(RUN)/data/test.jsonl --comet Unbabel/wmt22-comet-da $(ROWS)

paper: .venv/installed
	$(PYTHON) data.py --source $(SOURCE) --data $(CORPORA) --out $(RUN)/data
	$(GPUS) train.py --stage 1 --model $(MODEL) --data $(RUN)/data --out $(RUN)/stage1
	$(GPUS) pivot.py --adapter $(RUN)/stage1/adapter --data $(RUN)/data --out $(RUN)/pseudo $(ROWS)
	$(GPUS) train.py --stage 2 --model $(MODEL) --data $(RUN)/data --pseudo $(RUN)/pseudo \
	  --out $(RUN)/stage2
	$(GPUS) evaluate.py $(SCORE) --model $(MODEL) --out $(RUN)/scores/base
	$(GPUS) evaluate.py $(SCORE) --adapter $(RUN)/stage1/adapter --out $(RUN)/scores/stage1
	$(GPUS) evaluate.py $(SCORE) --adapter $(RUN)/stage2/adapter --out $(RUN)/scores/stage2
	$(PYTHON) support/report.py $(RUN)/scores/base $(RUN)/scores/stage1 $(RUN)/scores/stage2 --paper
