// Linear layers of few rows, and the gated MLP: weights are read once, in the order of memory.

#pragma once
#include "gemv.h"
#include "mlp.h"

constexpr long OUTPUTS = 96;  // of a job: whole tiles of any number of rows

// Linear layers of one x [rows, in].
template <class T>
struct LinearsArgs {
    struct Layer {
        long out;
        const T *weight, *bias;  // [out, in], and [out] or null
        T* y;                    // [rows, out]
    };
    long rows, in, threads;
    const T* x;
    std::vector<Layer> layers;
    std::vector<std::pair<long, long>> parts;  // of each job: the layer and its first output

    LinearsArgs(long rows, long in, long threads, const T* x) : rows(rows), in(in), threads(threads), x(x) {}

    void add(const Layer& layer) {
        for (long first = 0; first < layer.out; first += OUTPUTS) parts.emplace_back(layers.size(), first);
        layers.push_back(layer);
    }
};

template <class T>
struct LinearsWorker {
    const LinearsArgs<T>& args;
    explicit LinearsWorker(const LinearsArgs<T>& args) : args(args) {}

    void run(long job) {
        auto [l, first] = args.parts[job];
        const auto& layer = args.layers[l];
        long count = std::min(OUTPUTS, layer.out - first);
        linear<T>(args.rows, args.in, count, args.x, args.in, layer.weight + first * args.in, layer.y + first,
                  layer.out);
        if (!layer.bias) return;
        for (long m = 0; m < args.rows; ++m)
            for (long n = first; n < first + count; ++n) layer.y[m * layer.out + n] += layer.bias[n];
    }
};

// h = silu(x W_gate^T) * (x W_up^T); `down` of h is a linear layer.
template <class T>
struct GatedArgs {
    long rows, in, hidden, threads;
    const T *x, *gate, *up;
    T* h;  // [rows, hidden]
};

template <class T>
struct GatedWorker {
    const GatedArgs<T>& args;
    std::vector<T> gate, up;

    explicit GatedWorker(const GatedArgs<T>& args) : args(args), gate(args.rows * OUTPUTS + WIDTH<T>), up(gate) {}

    void run(long job) {
        long first = job * OUTPUTS, count = std::min(OUTPUTS, args.hidden - first);
        linear<T>(args.rows, args.in, count, args.x, args.in, args.gate + first * args.in, gate.data(), OUTPUTS);
        linear<T>(args.rows, args.in, count, args.x, args.in, args.up + first * args.in, up.data(), OUTPUTS);
        for (long m = 0; m < args.rows; ++m) {
            T *g = gate.data() + m * OUTPUTS, *h = args.h + m * args.hidden + first;
            activate<T>(Activation::silu, 1, count, g, 0, g, {}, {});
            for (long n = 0; n < count; ++n) h[n] = g[n] * up[m * OUTPUTS + n];
        }
    }
};
