import groovy.json.JsonSlurper
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardCopyOption
import java.security.MessageDigest

/** The files of one model of a release, checked against its manifest, put where an asset pack takes them from. */
class ReleasedModel {

    /** Paths and hashes of what ships in a quantization (Q4_0, ...) or ONNX variant (int4, ...). */
    static Map<String, String> files(Path release, String quant) {
        def manifest = new JsonSlurper().parse(release.resolve('manifest.json').toFile(), 'UTF-8')
        if (manifest.kind != 'release-manifest' || manifest.schema_version != 5) {
            throw new IllegalArgumentException("${release}/manifest.json is of another kind or version")
        }
        def shipped = manifest.files.findAll { it.role == 'shipped' }
        def chosen = shipped.find { it.quant == quant }
        if (chosen == null) {
            throw new IllegalArgumentException("no ${quant} in the release; there are ${shipped*.quant.join(', ')}")
        }
        Map<String, String> found = [:]
        manifest.contents.each { content ->
            if (content.path == chosen.file || content.path.startsWith(chosen.file + '/')) {
                found[content.path] = content.sha256
            }
        }
        return found
    }

    /** Copy them into a folder; what was there of another model goes. Fails where a byte is not the released one. */
    static void place(Path release, String quant, Path assets) {
        def wanted = files(release, quant)
        if (Files.isDirectory(assets)) {
            def old = Files.walk(assets).filter { Files.isRegularFile(it) }.toList()
            old.each { if (!wanted.containsKey(assets.relativize(it).toString().replace('\\', '/'))) Files.delete(it) }
        }
        wanted.each { name, hash ->
            def source = release.resolve(name).normalize()
            def target = assets.resolve(name).normalize()
            if (!source.startsWith(release.normalize()) || !target.startsWith(assets.normalize())) {
                throw new IllegalArgumentException("${name} leads out of the release")
            }
            if (sha256(source) != hash) {
                throw new IllegalArgumentException("${source} is not the released file")
            }
            Files.createDirectories(target.parent)
            Files.copy(source, target, StandardCopyOption.REPLACE_EXISTING)
        }
    }

    static String sha256(Path file) {
        def digest = MessageDigest.getInstance('SHA-256')
        file.toFile().eachByte(1 << 20) { bytes, count -> digest.update(bytes, 0, count) }
        return digest.digest().encodeHex().toString()
    }

    static void main(String[] arguments) {
        try {
            place(Path.of(arguments[0]), arguments[1], Path.of(arguments[2]))
        } catch (IllegalArgumentException | IOException error) {
            System.err.println("error: ${error.message}")
            System.exit(1)
        }
    }
}
