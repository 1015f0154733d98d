// A, B, D, E and Em of one chunk, token by token, and back; `decays.py` says the same in PyTorch.

#pragma once
#include <algorithm>

#include "products.h"

template <class T>
struct Decays {
    long c, ld;                       // tokens, and numbers from one row of D to the next
    std::vector<T> theta, eta, keep;  // keep: 1 - alpha
    std::vector<char> present;
    std::vector<T> a, b, e;            // [C]
    std::vector<T> d, em;              // [C, C]: row t of D; Em after token t
    std::vector<T> minus_d, minus_em;  // [C]: -D[C] and -Em[C], factors of tokens

    explicit Decays(long c)
        : c(c), ld(leading<T>(c)), theta(c), eta(c), keep(c), present(c), a(c), b(c), e(c), d(c * ld), em(c * ld),
          minus_d(c), minus_em(c) {}

    // What is left of W' and S at the chunk's end.
    const T* left_a() const { return &a[c - 1]; }
    const T* left_b() const { return &b[c - 1]; }
    const T* left_e() const { return &e[c - 1]; }

    // Gates `stride` numbers apart; a token not `here` (null: all are) leaves everything as it is.
    void of(const T* thetas, const T* etas, const T* alphas, long stride, const unsigned char* here) {
        T m_a = 1, m_b = 0, s_e = 1;
        for (long t = 0; t < c; ++t) {
            present[t] = !here || here[t];
            theta[t] = present[t] ? thetas[t * stride] : T(0);
            eta[t] = present[t] ? etas[t * stride] : T(1);
            keep[t] = present[t] ? 1 - alphas[t * stride] : T(1);
            T added = present[t] ? T(1) : T(0);
            e[t] = s_e = eta[t] * s_e;
            a[t] = m_a = keep[t] * m_a;
            b[t] = m_b = keep[t] * m_b + added * s_e;
            T *s = &em[t * ld], *m = &d[t * ld];
            for (long j = 0; j < t; ++j) {
                s[j] = eta[t] * s[j - ld];
                m[j] = keep[t] * m[j - ld] + added * s[j];
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

    bool nothing_is_written() const {
        for (T x : theta)
            if (x != 0) return false;
        return true;
    }
};

template <class T>
struct DecayGradients {
    long c, ld;
    std::vector<T> a, b, d;  // by A, B and D, [C], [C], [C, C]; spoilt by `back`
    T e = 0;                 // by E[C]
    std::vector<T> em;       // by Em[C], [C]

    explicit DecayGradients(long c) : c(c), ld(leading<T>(c)), a(c), b(c), d(c * ld), em(ld) {}

    void clear() {
        for (auto* x : {&a, &b, &d, &em}) std::fill(x->begin(), x->end(), T(0));
        e = 0;
    }

    void back(const Decays<T>& at, T* theta, T* eta, T* alpha, long stride) {
        std::vector<T> s(ld);  // by the row of momentum: E's column apart
        T s_e = e;
        std::copy(em.begin(), em.end(), s.begin());
        for (long t = c - 1; t >= 0; --t) {
            T* m = &d[t * ld];
            if (t + 1 < c) {  // M_{t+1} = keep M_t + S_{t+1}
                T keep = at.keep[t + 1];
                a[t] += keep * a[t + 1];
                b[t] += keep * b[t + 1];
                for (long j = 0; j <= t; ++j) m[j] += keep * m[ld + j];
            }
            if (at.present[t]) {
                s_e += b[t];
                for (long j = 0; j <= t; ++j) s[j] += m[j];
            }
            T by_eta = s_e * (t ? at.e[t - 1] : T(1)), by_keep = a[t] * (t ? at.a[t - 1] : T(1));
            if (t) {
                by_eta += dot(s.data(), &at.em[(t - 1) * ld], t);
                by_keep += b[t] * at.b[t - 1] + dot(m, &at.d[(t - 1) * ld], t);
            }
            theta[t * stride] = at.present[t] ? s[t] : T(0);
            eta[t * stride] = at.present[t] ? by_eta : T(0);
            alpha[t * stride] = at.present[t] ? -by_keep : T(0);
            s_e *= at.eta[t];
            for (long j = 0; j < t; ++j) s[j] *= at.eta[t];
        }
    }
};
