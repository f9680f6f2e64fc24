# siesta on CUDA: Python 3.11 and what requirements.lock pins, whose torch brings its own CUDA libraries (13.0). The host
# needs the NVIDIA driver and container toolkit. Not built yet: tests/test_container.py checks what can be without Docker.
#   docker build -t siesta .
#   docker run --gpus all --shm-size 8g -v "$PWD/outputs:/siesta/outputs" siesta train smollm2_135m
FROM python:3.11-slim-bookworm

# Triton and torch.compile build small extensions at run time. (DeepSpeed builds kernels of its own where a setting asks
# for them, such as offloading; that takes nvcc, which is not in this image.)
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /siesta
# The packages first: they change less often than the code, and a layer that did not change is not built again.
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY rl ./rl
COPY rewards ./rewards
COPY data ./data
COPY recipes ./recipes
COPY examples ./examples
# Built with the setuptools that is pinned; everything else is there already.
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Runs and downloaded weights belong on volumes.
ENV HF_HOME=/siesta/outputs/hub
VOLUME /siesta/outputs
ENTRYPOINT ["siesta"]
CMD ["doctor"]
