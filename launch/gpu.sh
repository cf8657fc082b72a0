set -u
export PYTHONPATH=/tmp/site OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 CUDA_MODULE_LOADING=LAZY
case $1 in
start)
  mkdir -p /root/w /root/log /root/pack; cp -r .world/tree/. /root/w/; cp .world/launch/*.py /root/
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
  cd /root/w; setsid python3 /root/main.py > /root/log/main.log 2>&1 < /dev/null & ;;
more) cp .world/launch/*.py /root/ ;;
esac
for i in $(seq 1 $2); do [ -f /root/all ] && break; sleep 1; done
cat /root/say.log; for f in /root/log/*.log; do echo "-- $f"; tr '\r' '\n' < $f | grep -v "it/s\|s/it\|^$" | tail -2 | cut -c1-250; done
cd /root/w; rm -rf /root/out; mkdir /root/out; sha256sum demo/weights/*.safetensors
cp -r docs demo/run/samples demo/run/train.log /root/out/ 2>/dev/null
# 64 MiB come back: what the first call sent is not sent again.
if [ ! -f /root/sent ]; then cp -r /root/pack /root/out/; [ -f /root/pack/base.safetensors ] && touch /root/sent; fi
mkdir -p /root/out/weights; for f in demo/weights/small_world_[!vp]*; do cp $f /root/out/weights/; done
for f in demo/run/*/encoder.safetensors; do d=$(dirname $f); mkdir -p /root/out/enc/$(basename $d); cp -r $d/encoder.safetensors $d/base.txt $d/config.json $d/metrics.jsonl $d/encoder.md $d/samples /root/out/enc/$(basename $d)/ 2>/dev/null; done
cp -r .comfyui/evaluation/answers /root/out/ 2>/dev/null
tar cf - -C /root/out . | gzip -1 | split -b 15500000 - $OUT/pack.tgz.; ls -la $OUT
