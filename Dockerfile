# docker build -t puma .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" puma demo
# Paths of commands are those below the folder that is mounted at /work; caches are kept there too (.cache, .config).
# With a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t puma .
#             docker run --rm --gpus all --ipc host ... (several GPUs exchange gradients through /dev/shm)
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
# torch in the version of constraints.txt from its own index, everything else in those versions from PyPI
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt '.[hub]' && mkdir -m 1777 /work
# the home of any --user
ENV HOME=/work
WORKDIR /work
ENTRYPOINT ["puma"]
CMD ["demo"]
