package com.example.chat

import java.io.File
import java.io.InputStream

/**
 * The model as a file of its own, as llama.cpp maps it: an asset lies inside the app's package. It is copied once for each
 * version of the app, and counts when it has its name: a copy that was interrupted is made anew, and who comes while one
 * is made waits for it.
 *
 * @param folder Of the app's private storage, for models alone; what other versions left there goes.
 * @param version Changes whenever the asset may have changed, as the time of the app's last update does.
 * @param open The asset.
 * @throws java.io.IOException where there is no room.
 */
fun modelFile(folder: File, version: String, name: String, open: () -> InputStream): File = synchronized(copying) {
    val place = File(folder, version)
    val file = File(place, name)
    folder.listFiles().orEmpty().filter { it != place }.forEach { it.deleteRecursively() }
    if (!file.isFile) copy(file, open)
    file
}

private val copying = Any()

private fun copy(file: File, open: () -> InputStream) {
    file.parentFile?.mkdirs()
    val part = File("$file.part")
    try {
        open().use { asset ->
            part.outputStream().use { copy ->
                asset.copyTo(copy, 1 shl 20)
                copy.fd.sync()
            }
        }
        check(part.renameTo(file)) { "cannot rename $part" }
    } finally {
        part.delete()
    }
}
