# An image for launch/kubernetes.yaml, launch/skypilot.yaml and Slurm's containers. Versions are those of constraints.txt.
#
#   docker build --tag triquetra:0.1.0 .                        # CUDA; the driver is the host's
#   docker build --tag triquetra:0.1.0-cpu --build-arg DEVICE=cpu .
#   docker run --rm --init --gpus all --shm-size 16g --volume "$PWD/runs:/runs" triquetra:0.1.0 \
#       triquetra train experiment=demo run_dir=/runs
#
# /runs must be writable for the user 1000. A compiler is in it as flex attention (and compile=true) needs one.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}

# hadolint ignore=DL3008 # versions of a distribution leave its archive; the tag of the base image is what is pinned
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 triquetra \
    && install --directory --owner=1000 --group=1000 /runs

ARG DEVICE=cuda
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Libraries first: a change of the code does not fetch them anew. On Linux torch itself brings CUDA's.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY trainer/__init__.py trainer/
COPY configs configs
RUN python3 -m venv /opt/venv \
    && index=$([ "$DEVICE" = cuda ] || echo "--extra-index-url=https://download.pytorch.org/whl/$DEVICE") \
    && /opt/venv/bin/pip install ${index:+"$index"} --constraint constraints.txt .

COPY trainer trainer
RUN /opt/venv/bin/pip install --no-deps --force-reinstall --constraint constraints.txt .

# triquetra, as a number: Kubernetes cannot tell by a name that it is not root
USER 1000
WORKDIR /home/triquetra
CMD ["triquetra", "--help"]
