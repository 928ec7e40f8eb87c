# The map of the method. Every target prints the commands it runs, and running it again continues where it stopped.
#
#   make tiny     the whole pipeline on a toy world of six languages, CPU, minutes
#   make compare  every adapter that the paper compares on that world, three seeds, CPU, 10 to 30 minutes -> docs/results.md
#   make test     the tests
#   make paper    the same chain with the paper's values, two 80 GB GPUs (MODEL=..., CORPORA=..., SOURCE=... to change)

PYTHON  = .venv/bin/python
MODEL   = meta-llama/Meta-Llama-3-8B-Instruct
CORPORA = corpora
SOURCE  = publisher
RUN     = runs/$(notdir $(MODEL))
GPUS    = .venv/bin/torchrun --standalone --nproc_per_node=2
CPUS    = OMP_NUM_THREADS=1 $(GPUS)

tiny compare test: export CUDA_VISIBLE_DEVICES =  # CPU runs, whatever the machine has

.PHONY: tiny compare test paper world

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

T = runs/tiny
TINY_TRAIN  = --model $(T)/backbone --data $(T)/data --lr 5e-3 --epochs 1 --micro-batch-size 16
TINY_DECODE = --max-new-tokens 48 --batch-size 128

world: .venv/installed
	$(PYTHON) examples/tiny/world.py --out $(T)/world --dev 50 --test 100
	$(PYTHON) examples/tiny/pretrain.py --world $(T)/world --out $(T)/backbone

compare: world
	$(PYTHON) examples/tiny/compare.py --world $(T)/world --backbone $(T)/backbone --out runs/compare --results docs/results.md

tiny: world
	$(PYTHON) data.py --data $(T)/world --out $(T)/data --languages en,de,is,cs,ru,zh --train-pairs 300 --dev-pairs 20 --test-pairs 50
	$(CPUS) train.py --stage 1 $(TINY_TRAIN) --out $(T)/stage1
	$(CPUS) pivot.py --adapter $(T)/stage1/adapter --data $(T)/data --out $(T)/pseudo --pairs 300 $(TINY_DECODE)
	$(CPUS) train.py --stage 2 $(TINY_TRAIN) --pseudo $(T)/pseudo --out $(T)/stage2
	$(CPUS) evaluate.py --all-directions --model $(T)/backbone --test $(T)/data/test.jsonl --out $(T)/scores/base $(TINY_DECODE)
	$(CPUS) evaluate.py --all-directions --adapter $(T)/stage1/adapter --test $(T)/data/test.jsonl --out $(T)/scores/stage1 $(TINY_DECODE)
	$(CPUS) evaluate.py --all-directions --adapter $(T)/stage2/adapter --test $(T)/data/test.jsonl --out $(T)/scores/stage2 $(TINY_DECODE)
	$(PYTHON) evaluate.py --table $(T)/scores/base $(T)/scores/stage1 $(T)/scores/stage2
	@echo "adapters:      $(T)/stage1/adapter $(T)/stage2/adapter"
	@echo "pseudo-corpus: $(T)/pseudo/report.md"
	@echo "translations:  $(T)/scores/*/hypotheses.jsonl, a line a direction in table.md"

test: .venv/installed
	$(PYTHON) -m pytest -q -n 2 tests

# sentences decoded together (default 128): about 2**18 slots of cache at most, 32 GiB for Llama-3-8B, beside the backbone's 15
ROWS  = --batch-size 512
SCORE = --test $(RUN)/data/test.jsonl --comet Unbabel/wmt22-comet-da

paper: .venv/installed
	$(PYTHON) data.py --source $(SOURCE) --data $(CORPORA) --out $(RUN)/data
	$(GPUS) train.py --stage 1 --model $(MODEL) --data $(RUN)/data --out $(RUN)/stage1
	$(GPUS) pivot.py --adapter $(RUN)/stage1/adapter --data $(RUN)/data --out $(RUN)/pseudo $(ROWS)
	$(GPUS) train.py --stage 2 --model $(MODEL) --data $(RUN)/data --pseudo $(RUN)/pseudo --out $(RUN)/stage2
	$(GPUS) evaluate.py --all-directions --model $(MODEL) $(SCORE) $(ROWS) --out $(RUN)/scores/base
	$(GPUS) evaluate.py --all-directions --adapter $(RUN)/stage1/adapter $(SCORE) $(ROWS) --out $(RUN)/scores/stage1
	$(GPUS) evaluate.py --all-directions --adapter $(RUN)/stage2/adapter $(SCORE) $(ROWS) --out $(RUN)/scores/stage2
	$(PYTHON) evaluate.py --table $(RUN)/scores/base $(RUN)/scores/stage1 $(RUN)/scores/stage2 --compare paper
