# The quickstart in a container: docker build -t sasa_train . && docker run --rm sasa_train
# With your images, a folder per class, and the runs kept in this folder:
#   mkdir -p outputs
#   docker run --rm --shm-size=1g --user "$(id -u)" -v /path/to/images:/images:ro -v "$PWD/outputs:/work/outputs" \
#     sasa_train sasa-train data.root=/images
# It has PyTorch for CPUs; --build-arg TORCH_INDEX=URL takes another of PyTorch's package indexes, as for CUDA.

# The wheel contains the compiled CPU kernels, so that the image needs no compiler.
FROM python:3.12-bookworm AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" --index-url "$TORCH_INDEX"
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir /wheel/*.whl
RUN useradd --uid 1000 --create-home sasa && mkdir -m 1777 /work
USER 1000
WORKDIR /work
CMD ["sasa-train", "experiment=quickstart"]
