// swift-tools-version: 5.10
import PackageDescription

// llama.cpp: on Apple's systems llama.xcframework beside this file, from llama.cpp's releases or its
// build-xcframework.sh; on Linux the libraries whose folders the command line names (-Xcc -I..., -Xlinker -L...).
#if os(Linux)
    let llama: Target = .systemLibrary(name: "llama")
#else
    let llama: Target = .binaryTarget(name: "llama", path: "llama.xcframework")
#endif

let package = Package(
    name: "PhonereadyBench",
    platforms: [.iOS("16.4"), .macOS("13.3")],
    products: [
        .`library`(name: "PhonereadyBench", targets: ["PhonereadyBench"]),
        .`library`(name: "PhonereadyChat", targets: ["PhonereadyChat"]),
        .executable(name: "phoneready-bench", targets: ["phoneready-bench"]),
        .executable(name: "phoneready-chat", targets: ["phoneready-chat"]),
    ],
    targets: [
        llama,
        .target(name: "LlamaCommon", dependencies: ["llama"]),
        .target(name: "PhonereadyBench", dependencies: ["LlamaCommon", "llama"]),
        .executableTarget(name: "phoneready-bench", dependencies: ["PhonereadyBench"]),
        .target(name: "PhonereadyChat", dependencies: ["LlamaCommon", "llama"]),
        .executableTarget(name: "phoneready-chat", dependencies: ["PhonereadyChat"]),
        .testTarget(name: "PhonereadyBenchTests", dependencies: ["PhonereadyBench"]),
        .testTarget(name: "PhonereadyChatTests", dependencies: ["PhonereadyChat"]),
    ]
)
