// The functions that Python calls. The compiler is given their type of number, Scalar.

#include <atomic>
#include <new>
#include <thread>

#include "attention_step.h"
#include "row_backward.h"
#include "layer_step.h"
#include "residual.h"
#include "segments.h"
#include "subnormals.h"

// Run jobs on `threads` threads, or as many as the system gives, each with a Worker of its own. Returns 0, or 1 if memory
// ran out. The counter's last atomic operation also makes a worker's streaming stores visible to all threads.
template <class Worker, class Args, class Act>
long run_jobs(const Args& args, long jobs, Act act) {
    std::atomic<long> next{0}, failed{0};
    auto work = [&] {
        NoSubnormals while_computing;
        try {
            Worker worker(args);
            for (long job; (job = next++) < jobs;) act(worker, job);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    try {
        for (long i = 1; i < std::min(args.threads, jobs); ++i) others.emplace_back(work);
    } catch (const std::exception&) {
    }
    work();
    for (std::thread& t : others) t.join();
    return failed;
}

template <class Act>
long guarded(Act act) {
    NoSubnormals while_computing;
    try {
        return act();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

static long run_linears(const LinearsArgs<Scalar>& args) {
    return run_jobs<LinearsWorker<Scalar>>(args, args.parts.size(),
                                           [](LinearsWorker<Scalar>& worker, long job) { worker.run(job); });
}

extern "C" {
long titans_state_size(const ScanArgs<Scalar>* args) {
    return SavedLayout<Scalar>(args->chunk_size, args->widths, args->layers).state_size;
}
long titans_saved_size(const ScanArgs<Scalar>* args) {
    return SavedLayout<Scalar>(args->chunk_size, args->widths, args->layers).saved_size;
}
long titans_forward(const ScanArgs<Scalar>* args) {
    return run_jobs<RowForward<Scalar>>(*args, args->batch * args->heads,
                                        [](RowForward<Scalar>& row, long r) { row.forward(r); });
}
long titans_backward(const ScanArgs<Scalar>* args) {
    return run_jobs<RowBackward<Scalar>>(*args, args->batch * args->heads,
                                         [](RowBackward<Scalar>& row, long r) { row.backward(r); });
}
long titans_decode(const ScanArgs<Scalar>* args) {
    return run_jobs<RowDecoder<Scalar>>(*args, args->batch * args->heads,
                                        [&](RowDecoder<Scalar>& row, long r) { decode_row(*args, row, r); });
}
// Steps of a decoded token: functions of one signature, so that `titans_replay` can run a list of them.
long titans_layer_step(const long* numbers, const long* of_layer, const double* scalars) {
    LayerStepArgs<Scalar> args(numbers, of_layer, scalars);
    long channels = args.channels(), failed = 0;
    if (args.output_gate_weight) {
        LinearsArgs<Scalar> before(args.batch, args.dim, args.threads, args.x);
        for (long part = 0; part < args.parts; ++part)
            before.add({channels, args.projections[part], nullptr, args.projected[part]});
        before.add({channels, args.output_gate_weight, nullptr, args.output_gate});
        failed |= run_linears(before);
    }
    auto step = [](auto& step, long r) { step.step(r); };
    if (args.slots) {
        failed |= run_jobs<LayerStep<Scalar, FactoredDecoder>>(args, args.batch * args.heads, step);
        for (long b = 0; b < args.batch; ++b) args.new_position[b] = (args.position[b] + 1) % args.chunk_size;
    } else {
        failed |= run_jobs<LayerStep<Scalar, RowDecoder>>(args, args.batch * args.heads, step);
    }
    if (args.output_projection) {
        LinearsArgs<Scalar> after(args.batch, channels, args.threads, args.y);
        after.add({args.dim, args.output_projection, nullptr, args.output});
        failed |= run_linears(after);
    }
    return failed;
}
// `numbers`: rows, in, threads, the number of linear layers and x; then out, weight, bias and y of each layer.
long titans_linears(const long* numbers, const long*, const double*) {
    LinearsArgs<Scalar> args(numbers[0], numbers[1], numbers[2], reinterpret_cast<const Scalar*>(numbers[4]));
    for (const long* n = numbers + 5; n < numbers + 5 + 4 * numbers[3]; n += 4)
        args.add({n[0], reinterpret_cast<const Scalar*>(n[1]), reinterpret_cast<const Scalar*>(n[2]),
                  reinterpret_cast<Scalar*>(n[3])});
    return run_linears(args);
}
// `n`: rows, width, hidden width, threads, x, the branch's output, the weights of norm, gate, up and down, room for
// [2, rows, width] and [rows, hidden], and y = z + MLP(norm(z)), z = x + branch.
long titans_residual_mlp(const long* n, const long*, const double* eps) {
    auto at = [&](long i) { return reinterpret_cast<Scalar*>(n[i]); };
    long rows = n[0], width = n[1], hidden = n[2], threads = n[3], size = rows * width;
    Scalar *z = at(10), *normed = z + size, *y = at(12);
    for (long i = 0; i < size; ++i) z[i] = at(4)[i] + at(5)[i];
    for (long m = 0; m < rows; ++m) rms_norm<Scalar>(width, z + m * width, at(6), eps[0], normed + m * width);
    GatedArgs<Scalar> gated{rows, width, hidden, threads, normed, at(7), at(8), at(11)};
    long failed = run_jobs<GatedWorker<Scalar>>(gated, (hidden + OUTPUTS - 1) / OUTPUTS,
                                                [](GatedWorker<Scalar>& worker, long job) { worker.run(job); });
    LinearsArgs<Scalar> down(rows, hidden, threads, at(11));
    down.add({width, at(9), nullptr, y});
    failed |= run_linears(down);
    for (long i = 0; i < size; ++i) y[i] += z[i];
    return failed;
}
// `n`: rows, width, y, m, the weights of their norms, room for a row and a vector, and the output.
long titans_product_gate(const long* n, const long*, const double* eps) {
    auto at = [&](long i) { return reinterpret_cast<Scalar*>(n[i]); };
    for (long m = 0; m < n[0]; ++m)
        gated_product<Scalar>(n[1], at(2) + m * n[1], at(3) + m * n[1], at(4), at(5), eps[0], eps[1], at(6),
                              at(7) + m * n[1]);
    return 0;
}
// `n`: rows, width, x, weight, y.
long titans_rms_norm(const long* n, const long*, const double* eps) {
    auto at = [&](long i) { return reinterpret_cast<Scalar*>(n[i]); };
    for (long m = 0; m < n[0]; ++m) rms_norm<Scalar>(n[1], at(2) + m * n[1], at(3), eps[0], at(4) + m * n[1]);
    return 0;
}
// `n`: size, a, b, a + b.
long titans_add(const long* n, const long*, const double*) {
    auto at = [&](long i) { return reinterpret_cast<Scalar*>(n[i]); };
    for (long i = 0; i < n[0]; ++i) at(3)[i] = at(1)[i] + at(2)[i];
    return 0;
}
// `n`: rows, width, threads, y, m, weight and bias of the map of [y; m], room for [rows, 2 * width] and [rows, width], and
// g * y + (1 - g) * m with g the map's sigmoid.
long titans_convex_gate(const long* n, const long*, const double*) {
    auto at = [&](long i) { return reinterpret_cast<Scalar*>(n[i]); };
    long rows = n[0], width = n[1];
    Scalar *both = at(7), *g = at(8);
    for (long m = 0; m < rows; ++m) {
        std::copy_n(at(3) + m * width, width, both + 2 * m * width);
        std::copy_n(at(4) + m * width, width, both + (2 * m + 1) * width);
    }
    LinearsArgs<Scalar> map(rows, 2 * width, n[2], both);
    map.add({width, at(5), at(6), g});
    long failed = run_linears(map);
    for (long i = 0; i < rows * width; ++i) {
        Scalar open = sigmoid(g[i]);
        at(9)[i] = open * at(3)[i] + (1 - open) * at(4)[i];
    }
    return failed;
}
long titans_attention_step(const long* numbers, const long*, const double*) {
    AttentionStepArgs<Scalar> args(numbers);
    long inner = args.heads * args.width;
    LinearsArgs<Scalar> before(args.batch, args.dim, args.threads, args.x);
    before.add({inner, args.q_proj, nullptr, args.q});
    before.add({inner, args.k_proj, nullptr, args.k});
    before.add({inner, args.v_proj, nullptr, args.v});
    long failed = run_linears(before);
    if (args.before) {
        LinearsArgs<Scalar> retrieved(args.batch, args.dim, args.threads, args.before);
        retrieved.add({inner, args.k_proj, nullptr, args.before_k});
        retrieved.add({inner, args.v_proj, nullptr, args.before_v});
        failed |= run_linears(retrieved);
    }
    failed |= run_jobs<AttentionStep<Scalar>>(args, args.batch * args.heads,
                                              [](AttentionStep<Scalar>& step, long r) { step.step(r); });
    LinearsArgs<Scalar> after(args.batch, inner, args.threads, args.y);
    after.add({args.dim, args.o_proj, nullptr, args.output});
    return run_linears(after) | failed;
}
// Run `count` steps, one after another: of each its address and its arguments.
long titans_replay(const long* steps, long count) {
    typedef long (*Step)(const long*, const long*, const double*);
    long failed = 0;
    for (; count; --count, steps += 4)
        failed |= reinterpret_cast<Step>(steps[0])(reinterpret_cast<const long*>(steps[1]),
                                                   reinterpret_cast<const long*>(steps[2]),
                                                   reinterpret_cast<const double*>(steps[3]));
    return failed;
}
long titans_features_forward(const FeatureArgs<Scalar>* args) {
    return run_jobs<FeatureWorker<Scalar>>(*args, args->parts * args->heads,
                                           [](FeatureWorker<Scalar>& worker, long job) { worker.forward(job); });
}
long titans_features_backward(const FeatureArgs<Scalar>* args) {
    return run_jobs<FeatureWorker<Scalar>>(*args, args->parts * args->heads,
                                           [](FeatureWorker<Scalar>& worker, long job) { worker.backward(job); });
}
long titans_layer_forward(const LayerArgs<Scalar>* args) {
    return guarded([&] { return layer_forward(*args); });
}
long titans_layer_backward(const LayerArgs<Scalar>* args) {
    return guarded([&] { return layer_backward(*args); });
}
long titans_segments_forward(const SegmentArgs<Scalar>* args) {
    return guarded([&] { return segments_forward(*args); });
}
long titans_segments_backward(const SegmentArgs<Scalar>* args) {
    return guarded([&] { return segments_backward(*args); });
}
}
