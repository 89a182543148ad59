// Calls kernels for emulated.py: reads calls from stdin, makes them, writes the results to stdout. Both are sequences
// of 64-bit words and of memory:
//
//     in   length of the name, name, number of words, words,
//          number of regions; for each its size and content,
//          number of pointers; for each the number of its word, of its region, and its offset in bytes
//     out  what the kernel returned, the contents of all regions
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

static void take(void* to, size_t size) {
    if (size && fread(to, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 1);
}

static int64_t take_word() {
    int64_t word;
    take(&word, sizeof word);
    return word;
}

int main(int, char** argv) {
    void* const library = dlopen(argv[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    for (;;) {
        std::string name;
        name.resize(size_t(take_word()));
        take(&name[0], name.size());
        std::vector<int64_t> words;
        words.resize(size_t(take_word()));
        take(words.data(), words.size() * sizeof(int64_t));
        std::vector<std::vector<char>> regions;
        regions.resize(size_t(take_word()));
        for (auto& region : regions) {
            region.resize(size_t(take_word()));
            take(region.data(), region.size());
        }
        for (int64_t left = take_word(); left > 0; left--) {
            const size_t word = size_t(take_word()), region = size_t(take_word());
            words[word] = int64_t(regions[region].data() + take_word());
        }
        const auto function = (int64_t(*)(const void*))dlsym(library, name.c_str());
        if (!function) {
            fprintf(stderr, "no %s\n", name.c_str());
            return 1;
        }
        const int64_t result = function(words.data());
        fwrite(&result, sizeof result, 1, stdout);
        for (const auto& region : regions) fwrite(region.data(), 1, region.size(), stdout);
        fflush(stdout);
    }
}
