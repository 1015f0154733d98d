// The factors A, B, D, E and Em of one chunk, token by token, and their backward pass. `decays.py` is the same in PyTorch.

#pragma once
#include <algorithm>

#include "matmul.h"

template <class T>
struct Decays {
    long c, ld;                         // tokens, and scalars from one row of D to the next
    std::vector<T> theta, eta, retain;  // retain: 1 - alpha
    std::vector<char> valid;
    std::vector<T> a, b, e;            // [C]
    std::vector<T> d, em;              // [C, C]: row t of D; Em after token t
    std::vector<T> minus_d, minus_em;  // [C]: -D[C] and -Em[C], for each token

    explicit Decays(long c)
        : c(c), ld(leading_dim<T>(c)), theta(c), eta(c), retain(c), valid(c), a(c), b(c), e(c), d(c * ld), em(c * ld),
          minus_d(c), minus_em(c) {}

    // The factors of W' and S at the chunk's end: A[C], B[C], E[C].
    const T* end_a() const { return &a[c - 1]; }
    const T* end_b() const { return &b[c - 1]; }
    const T* end_e() const { return &e[c - 1]; }

    // Compute them from gates that are `stride` scalars apart. A slot that is not valid (null: all are) changes nothing.
    void compute(const T* thetas, const T* etas, const T* alphas, long stride, const unsigned char* valid_slots) {
        T m_a = 1, m_b = 0, s_e = 1;
        for (long t = 0; t < c; ++t) {
            valid[t] = !valid_slots || valid_slots[t];
            theta[t] = valid[t] ? thetas[t * stride] : T(0);
            eta[t] = valid[t] ? etas[t * stride] : T(1);
            retain[t] = valid[t] ? 1 - alphas[t * stride] : T(1);
            T added = valid[t] ? T(1) : T(0);
            e[t] = s_e = eta[t] * s_e;
            a[t] = m_a = retain[t] * m_a;
            b[t] = m_b = retain[t] * m_b + added * s_e;
            T *s = &em[t * ld], *m = &d[t * ld];
            for (long j = 0; j < t; ++j) {
                s[j] = eta[t] * s[j - ld];
                m[j] = retain[t] * m[j - ld] + added * s[j];
            }
            s[t] = theta[t];
            m[t] = added * theta[t];
            for (long j = t + 1; j < ld; ++j) s[j] = m[j] = 0;
        }
        for (long t = 0; t < c; ++t) {
            minus_d[t] = -d[(c - 1) * ld + t];
            minus_em[t] = -em[(c - 1) * ld + t];
        }
    }

    bool writes_nothing() const {
        for (T x : theta)
            if (x != 0) return false;
        return true;
    }
};

template <class T>
struct DecayGradients {
    long c, ld;
    std::vector<T> a, b, d;  // by A, B and D, [C], [C], [C, C]; overwritten by `backward`
    T e = 0;                 // by E[C]
    std::vector<T> em;       // by Em[C], [C]

    explicit DecayGradients(long c) : c(c), ld(leading_dim<T>(c)), a(c), b(c), d(c * ld), em(ld) {}

    void clear() {
        for (auto* x : {&a, &b, &d, &em}) std::fill(x->begin(), x->end(), T(0));
        e = 0;
    }

    void backward(const Decays<T>& saved, T* theta, T* eta, T* alpha, long stride) {
        std::vector<T> s(ld);  // by the row (0, E, Em), without E
        T s_e = e;
        std::copy(em.begin(), em.end(), s.begin());
        for (long t = c - 1; t >= 0; --t) {
            T* m = &d[t * ld];
            if (t + 1 < c) {  // M_{t+1} = retain M_t + S_{t+1}
                T retain = saved.retain[t + 1];
                a[t] += retain * a[t + 1];
                b[t] += retain * b[t + 1];
                for (long j = 0; j <= t; ++j) m[j] += retain * m[ld + j];
            }
            if (saved.valid[t]) {
                s_e += b[t];
                for (long j = 0; j <= t; ++j) s[j] += m[j];
            }
            T grad_eta = s_e * (t ? saved.e[t - 1] : T(1)), grad_keep = a[t] * (t ? saved.a[t - 1] : T(1));
            if (t) {
                grad_eta += dot(s.data(), &saved.em[(t - 1) * ld], t);
                grad_keep += b[t] * saved.b[t - 1] + dot(m, &saved.d[(t - 1) * ld], t);
            }
            theta[t * stride] = saved.valid[t] ? s[t] : T(0);
            eta[t * stride] = saved.valid[t] ? grad_eta : T(0);
            alpha[t * stride] = saved.valid[t] ? -grad_keep : T(0);
            s_e *= saved.eta[t];
            for (long j = 0; j < t; ++j) s[j] *= saved.eta[t];
        }
    }
};
